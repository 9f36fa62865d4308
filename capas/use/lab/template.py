"""Ask the tuned model in the chat format of each family: the wrong template."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from capas.chat.format import ChatFormat
from capas.config.composition import CONF, composer
from capas.config.options import options_of
from capas.core.errors import CapasError
from capas.core.language import Language
from capas.evaluation.formats import Answers, Format
from capas.use.lab.questions import Questions, last_question, questions, shorten

GROUP = "chat_template"


def run(root: Path, count: int, language: Language) -> Iterator[str]:
    """Yield a table with a row for each chat template, and what it shows."""
    with questions(root, count) as test, test.served() as served:
        own = [record["prompt_ids"] for record in test.records]
        found = {test.params.chat_template.preset: test.ask(served)}
        yield str(language.say("template.head", count=len(own), metric=test.metric))
        trained = next(iter(found))
        yield row(trained, found[trained], language)
        same: list[str] = []
        for name, text, options in other_templates(root, trained):
            try:
                form = format_of(test, served.format.folder, text, options)
            except CapasError as error:
                yield f"{name:<12} {language.say('template.refused', reason=error).unescape()}"
                continue
            if form.prompts == own:
                same.append(name)
            found[name] = test.ask(served, form)
            yield row(name, found[name], language)
        yield ""
        yield from example(test, found, trained, language)
        others = {
            name: answers.score for name, answers in found.items() if name not in [trained, *same]
        }
        facts = {"trained": trained, "own": found[trained].score, "same": same, "others": others}
        yield language.say("template.finding", **facts).unescape()


def other_templates(root: Path, trained: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield name, text and options of each template in conf/, except the one used in training."""
    with composer(root / CONF) as compose:
        for name in options_of(root / CONF, GROUP):
            options = compose([f"{GROUP}={name}"])[GROUP]
            if name != trained and (root / options["path"]).is_file():
                yield name, (root / options["path"]).read_text(encoding="utf-8"), options


def format_of(test: Questions, tokenizer: Path, text: str, options: Mapping[str, Any]) -> Format:
    """Return the questions in the format of another template.

    Raises:
        CapasError: the tokenizer lacks the template's control tokens, or the template refuses a conversation.
    """
    given = (options["date_string"], options["system"], options["allowed_tokens"], options["path"])
    chat = ChatFormat.load(text, tokenizer, *given)
    prompts = [chat.prompt_ids(prompt.messages, prompt.tools) for prompt in test.prompts]
    return Format(prompts, chat.stop_token_ids)


def row(name: str, answers: Answers, language: Language) -> str:
    numbers = language.numbers
    return f"{name:<12} {numbers.pct(answers.score):>10} {numbers.pct(answers.stop_rate):>14}"


def example(
    test: Questions, found: Mapping[str, Answers], trained: str, language: Language
) -> Iterator[str]:
    """Yield a question and its answers in all formats.

    The model answers it correctly in its own format, and wrongly in the format with the lowest score.
    """
    worst = min(found, key=lambda name: found[name].score)
    rights, wrongs = found[trained].completions, found[worst].completions
    records = zip(test.records, rights, wrongs, strict=True)
    odd = [
        i
        for i, (record, right, wrong) in enumerate(records)
        if right.strip() == record["reference"].strip() != wrong.strip()
    ]
    if not odd:
        return
    yield language.say("template.example", question=last_question(test.prompts[odd[0]])).unescape()
    for name, answers in found.items():
        yield f"{name:<12} {shorten(answers.completions[odd[0]])}"
    yield ""
