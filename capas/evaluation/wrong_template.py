"""Ask in a chat template that the model was not trained with, as a misconfigured server does."""

import logging
from collections.abc import Iterator

from capas.chat.template import Template, TemplateRefusal, place_system
from capas.chat.tokenizer import TokenizerFiles
from capas.core.errors import CapasError
from capas.core.records import TEXT
from capas.evaluation.decoding import MODELS, Models
from capas.evaluation.predictions import Row
from capas.evaluation.prompts import Prompt

log = logging.getLogger("capas")


def ask_wrongly(
    models: Models, prompts: list[Prompt], wrong: Template, files: TokenizerFiles
) -> Iterator[Row]:
    """Yield the answers of both models under the first setting, asked in the template `wrong`.

    A prompt that the template refuses is skipped.
    """
    setting = next(iter(models.generation.settings))
    for prompt in prompts:
        if prompt.messages[0]["role"] == TEXT:
            continue  # a plain text has no template
        try:
            ids = encode_wrongly(wrong, prompt, files)
        except CapasError as refusal:  # the row only illustrates, so it is no reason to stop
            log.info("%s is not asked in the wrong template: %s", prompt.prompt_id, refusal)
            continue
        for which in MODELS:
            yield models.ask(which, prompt, ids, setting) | {"template": "wrong"}


def encode_wrongly(template: Template, prompt: Prompt, files: TokenizerFiles) -> list[int]:
    """Encode like a server with the wrong template, where control tokens unknown to the tokenizer fall apart.

    Raises:
        CapasError: the template refuses the conversation, with its system message folded or not.
    """
    try:
        text = template.render(prompt.messages, True, prompt.tools)
    except TemplateRefusal:  # the template may have no system role
        folded = place_system(prompt.messages, "fold")
        text = template.render(folded, True, prompt.tools)
    return files.encode_parsing([text])[0]
