"""Decide which tokens carry loss: the answers to be trained, and the label of each token."""

from capas.chat.messages import Messages, split_thought
from capas.chat.segments import Owned
from capas.chat.template import RecordRefusal
from capas.core.records import IGNORE_INDEX


def trained_messages(messages: Messages, train_on: str) -> set[int]:
    """Return the indices of the answers to be trained.

    Raises:
        RecordRefusal: there is no such answer, or one is empty.
    """
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise RecordRefusal("no assistant message: there is nothing to train on")
    answers = answers[-1:] if train_on == "last_assistant" else answers
    trained = [i for i in answers if messages[i].get("train", True)]
    if not trained and train_on != "all":
        raise RecordRefusal("every answer has train: false: there is nothing to train on")
    for index in trained:
        if not split_thought(messages[index])[1].strip() and "tool_calls" not in messages[index]:
            raise RecordRefusal(
                f"message {index}, an answer to be trained, is empty: {messages[index]['content']!r}"
            )
    return set(trained)


def labels_of(owned: Owned, trained: set[int], train_on: str) -> list[int]:
    """Return the label of each token: its id, or IGNORE_INDEX outside the loss.

    Args:
        owned: ids, each with the index of the answer that it belongs to, if any.
        trained: the answers to be trained.
        train_on: with `all`, every token carries loss.
    """
    everything = train_on == "all"
    return [i if everything or owner in trained else IGNORE_INDEX for i, owner in owned]
