"""Generate the corpus of the embedded base: bilingual chat in prose, translations, unrelated JSON, exercises.

The base learns the words, phrasings and chat formats of the task, to copy words it has never seen, and to
write JSON. It does not learn the task: no document has the name of one of its functions, pairs a request
with a call, or has a held-out value. The phrasings that fine-tuning holds out do occur, answered in prose,
as in the pretraining data of any base model.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from random import Random

from capas.dataset.task import phrases
from capas.dataset.task.prose import (
    FACTS,
    NUMBER_FACTS,
    RECORD_SYSTEMS,
    REPLIES,
    REPLY_IN,
    SUBJECTS,
    SYSTEMS,
)
from capas.dataset.task.requests import (
    Arguments,
    closed_slot,
    contract_articles,
    draw_ask,
    draw_fix,
    draw_request,
    fill_phrasing,
    list_phrasings,
    say_value,
)
from capas.dataset.task.values import draw, draw_number, draw_time, draw_value, invent_word

Message = dict[str, str]
OTHER = {"en": "es", "es": "en"}
INVENTED_SHARE = 0.5  # of the open values: invented words, which must be copied
CHAT_SHARES = {"chatml": 7, "llama3": 1, "mistral": 1, "gemma": 1}
DOCUMENT_SHARES = {
    "reply": 40,
    "record": 24,
    "translation": 10,
    "paraphrase": 6,
    "copy": 10,
    "lookup": 10,
}


@dataclass(frozen=True)
class Document:
    """One document: plain text, or a conversation written in the chat format of a model family."""

    kind: str
    text: str = ""
    messages: list[Message] = field(default_factory=list)
    chat: str = ""

    def render(self) -> str:
        """Return the document as the model reads it, including control tokens."""
        return render_chat(self.messages, self.chat) if self.messages else self.text


def say(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def render_chat(messages: list[Message], chat: str) -> str:
    """Return a conversation in the format of ChatML, Llama 3, Mistral v3 or Gemma.

    Mistral and Gemma have no system role: the system text opens the first user turn.
    """
    if chat == "chatml":
        return "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    if chat == "llama3":
        head = "<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>"
        return "<bos>" + "".join(head.format(**message) for message in messages)
    turns = fold_system(messages)
    if chat == "mistral":
        user, assistant = "[INST] {content}[/INST]", " {content}<eos>"
    else:
        user = "<start_of_turn>user\n{content}<end_of_turn>\n"
        assistant = "<start_of_turn>model\n{content}<end_of_turn>\n"
    forms = {"user": user, "assistant": assistant}
    return "<bos>" + "".join(forms[turn["role"]].format(**turn) for turn in turns)


def fold_system(messages: list[Message]) -> list[Message]:
    """Return the conversation with the text of its system message at the start of the first user turn."""
    if messages[0]["role"] != "system":
        return messages
    system, first, *rest = messages
    return [say("user", f"{system['content']}\n\n{first['content']}"), *rest]


def invent_phrase(rng: Random, num_words: int, capital: bool) -> str:
    """Return invented words, none of them held out."""
    words = [draw(rng, lambda: invent_word(rng), held_out=False) for _ in range(num_words)]
    return " ".join(word.capitalize() if capital else word for word in words)


def draw_loose(rng: Random, slot: str, language: str) -> str | int:
    """Return a value for an open slot of the task: one that training may use, or invented words."""
    words = {"text": (2, 5), "title": (1, 3), "item": (1, 2)}.get(slot, (1, 2))
    if slot not in phrases.NAMED_SLOTS or rng.random() > INVENTED_SHARE:
        return draw_value(rng, slot, language, held_out=False)
    capital = slot in ("contact", "city", "artist")
    return invent_phrase(rng, rng.randint(*words), capital)


def say_reply(rng: Random, function: str, language: str, arguments: Arguments) -> str:
    """Return the assistant's answer in prose."""
    written = {slot: write_value(slot, value, language) for slot, value in arguments.items()}
    text = rng.choice(REPLIES[function][language]).format(**written)
    return contract_articles(text[0].upper() + text[1:], language)


def write_value(slot: str, value: str | int, language: str) -> str:
    """Return a value as a careful writer notes it: a time with two-digit hours, a currency by its code."""
    plain = slot == "time" or closed_slot(slot) == "currency"
    return str(value) if plain else say_value(slot, value, language)


def draw_system(rng: Random, language: str, reply_language: str) -> list[Message]:
    """Return no system message, a general one, or one that requests the language of the replies."""
    if language != reply_language:
        return [say("system", REPLY_IN[reply_language])]
    return [say("system", rng.choice(SYSTEMS[language]))] if rng.random() < 0.6 else []


def draw_reply(rng: Random, language: str) -> Document:
    """Return a request like the task's, answered in prose, in one or two turns."""
    answer = OTHER[language] if rng.random() < 0.35 else language
    messages = draw_system(rng, language, answer)
    turns = rng.choice(("single", "single", "single", "ask", "fix"))
    if turns == "ask":
        request, question, reply = draw_ask(rng, language, draw_loose, None)
        messages += [say("user", request.text), say("assistant", question), say("user", reply)]
        final = request.arguments
    elif turns == "fix":
        request, final, _, text = draw_fix(rng, language, draw_loose, None)
        first = say_reply(rng, request.function, answer, request.arguments)
        messages += [say("user", request.text), say("assistant", first), say("user", text)]
    else:
        function = rng.choice(list(phrases.FUNCTIONS))
        request = draw_request(rng, function, language, draw_loose, None)
        messages.append(say("user", request.text))
        final = request.arguments
    messages.append(say("assistant", say_reply(rng, request.function, answer, final)))
    return chat_document(rng, "reply", messages)


def chat_document(rng: Random, kind: str, messages: list[Message]) -> Document:
    """Return a conversation in one of the chat formats."""
    chat = rng.choices(list(CHAT_SHARES), weights=list(CHAT_SHARES.values()))[0]
    return Document(kind, messages=messages, chat=chat)


def draw_fact(rng: Random, key: str, language: str) -> str | int:
    """Return a value for a key of an unrelated record."""
    if key in NUMBER_FACTS:
        return draw_number(rng, 2, 999, held_out=False)
    if key == "opened":
        return draw_time(rng, held_out=False)
    slot = {"motto": "text", "color": "item"}.get(key) or rng.choice(("contact", "city", "artist"))
    return draw_loose(rng, slot, language)


def draw_record(rng: Random, language: str) -> Document:
    """Return a sentence about a thing, and the same facts as a JSON record, nested or flat."""
    kind = rng.choice(list(SUBJECTS))
    keys = rng.sample(list(FACTS), rng.randint(1, 3))
    label = invent_phrase(rng, rng.randint(1, 2), capital=True)
    facts = {key: draw_fact(rng, key, language) for key in keys}
    clauses = [FACTS[key][language].format(say_fact(key, facts[key])) for key in keys]
    sentence = f"{SUBJECTS[kind][language].format(label)}: {', '.join(clauses)}."
    sentence = sentence[0].upper() + sentence[1:]
    record = {"kind": kind, "facts": facts} if rng.random() < 0.6 else {kind: label, **facts}
    written = json.dumps(record, ensure_ascii=False)
    if rng.random() < 0.2:
        return Document("record", text=f"{sentence} {written}")
    messages = [say("system", rng.choice(RECORD_SYSTEMS[language]))]
    return chat_document(
        rng, "record", [*messages, say("user", sentence), say("assistant", written)]
    )


def say_fact(key: str, value: str | int) -> str:
    """Return a fact's value as written in the sentence."""
    return say_value("time", value, "en") if key == "opened" else str(value)


def draw_core(rng: Random, function: str, language: str, arguments: Arguments) -> str:
    """Return a request without opening, closing and punctuation; its optional parts are kept or dropped."""
    _, phrasing = rng.choice(list_phrasings(function, language, None))
    return fill_phrasing(rng, phrasing, language, arguments)


def draw_translation(rng: Random, language: str) -> Document:
    """Return a request and its translation into the other language."""
    function = rng.choice(list(phrases.FUNCTIONS))
    request = draw_request(rng, function, language, draw_loose, None)
    text = draw_core(rng, function, OTHER[language], dict(request.arguments))
    return Document("translation", text=f"{language}: {request.text} {OTHER[language]}: {text}")


def draw_paraphrase(rng: Random, language: str) -> Document:
    """Return a request in two phrasings."""
    function = rng.choice(list(phrases.FUNCTIONS))
    request = draw_request(rng, function, language, draw_loose, None)
    text = draw_core(rng, function, language, dict(request.arguments))
    return Document("paraphrase", text=f"{request.text} = {text}")


def draw_copy(rng: Random, language: str) -> Document:
    """Return words and numbers that are repeated once, as a whole or one by one."""
    words = [
        invent_phrase(rng, 1, rng.random() < 0.5)
        if rng.random() < 0.75
        else str(draw_number(rng, 2, 999, held_out=False))
        for _ in range(rng.randint(2, 7))
    ]
    text = " ".join(words)
    forms = (f'{text} "{text}"', f"{text} / {text}", " ".join(f'{w}, "{w}".' for w in words))
    return Document("copy", text=rng.choice(forms))


def draw_lookup(rng: Random, language: str) -> Document:
    """Return some times, or words of the closed tables, each with its written form."""
    pairs = [draw_pair(rng, language) for _ in range(rng.randint(1, 4))]
    return Document("lookup", text="; ".join(f"{spoken} = {written}" for spoken, written in pairs))


def draw_pair(rng: Random, language: str) -> tuple[str, str]:
    """Return a time, or a word of a closed table, as (spoken form, written form)."""
    if rng.random() < 0.3:
        time = draw_time(rng, held_out=False)
        return say_value("time", time, language), time
    table = rng.choice(list(phrases.CLOSED))
    value, spoken = rng.choice(list(phrases.CLOSED[table].items()))
    return spoken[language], value


_DRAW = {
    "reply": draw_reply,
    "record": draw_record,
    "translation": draw_translation,
    "paraphrase": draw_paraphrase,
    "copy": draw_copy,
    "lookup": draw_lookup,
}


def generate_corpus(seed: int, num_documents: int | None = None) -> Iterator[Document]:
    """Yield documents, a pure function of the seed: `num_documents` of them, or without end if it is None."""
    rng = Random(f"{seed}/corpus")
    kinds, weights = list(DOCUMENT_SHARES), list(DOCUMENT_SHARES.values())
    for _ in count() if num_documents is None else range(num_documents):
        kind = rng.choices(kinds, weights)[0]
        yield _DRAW[kind](rng, rng.choice(phrases.LANGUAGES))
