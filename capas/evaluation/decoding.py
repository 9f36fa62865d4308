"""Ask base and tuned model the same prompts, and compare them token by token."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from capas.core.params import Params
from capas.core.records import IGNORE_INDEX
from capas.evaluation.predictions import Row
from capas.evaluation.prompts import Prompt

if TYPE_CHECKING:
    import torch

MODELS = ("base", "tuned")
NUM_TOKENS = 8  # tokens shown of a next-token distribution


@dataclass(frozen=True)
class Models:
    """The tuned model with its base, and the settings under which both answer."""

    tuned: Any
    chat: dict[str, Any]
    tokenizer: Tokenizer
    generation: Params
    max_new_tokens: int

    def ask(self, which: str, prompt: Prompt, ids: list[int], setting: str) -> Row:
        """Return a model's completions under one setting.

        The seed belongs to the prompt and the setting, so that other prompts do not change the completions.
        """
        import torch

        settings = self.generation.settings[setting].without()
        count = self.generation.num_return_sequences if settings["do_sample"] else 1
        torch.manual_seed(seed_of(self.generation.seed, prompt, setting))
        found = self._complete(which, ids, **settings, num_return_sequences=count)
        texts = [self._decode(completion) for completion in found]
        return {
            "prompt_id": prompt.prompt_id,
            "messages": prompt.messages,
            "reference": prompt.reference,
            "setting": setting,
            "model": which,
            "template": "right",
            "completions": texts,
            "num_distinct": len(set(texts)),
        }

    def look_inside(self, prompt: Prompt, ids: list[int]) -> tuple[Row, list[Row]]:
        """Find where the tuned model's greedy answer is least certain, and the tokens that are likely there.

        Returns:
            The place (reports/samples.json), and the rows of reports/next_token.csv: the most probable tokens
            of each model, with their probabilities before and after every setting that samples.
        """
        answer = self._complete("tuned", ids)[0]
        own = self._logits("tuned", ids, answer).log_softmax(dim=-1)
        position = int((-(own.exp() * own).sum(dim=-1)).argmax())  # the highest entropy
        rows = [
            {"model": which} | row
            for which in MODELS
            for row in self._probabilities(
                self._logits(which, ids, answer)[position], ids + answer[:position]
            )
        ]
        place = {
            "prompt_id": prompt.prompt_id,
            "position": position,
            "text_before": self._decode(answer[:position]),
            "tokens": [row["token"] for row in rows[-NUM_TOKENS:]],
        }
        return place, rows

    def losses(self, record: Row) -> list[Row]:
        """Return the loss of each token of a record's last trained answer under both models, in nats.

        Args:
            record: a record of data/formatted.
        """
        import torch

        start, end = last_trained(record["labels"])
        before, answer = record["input_ids"][:start], record["input_ids"][start:end]
        found = {}
        for which in MODELS:
            probabilities = self._logits(which, before, answer)[:-1].log_softmax(dim=-1)
            picked = probabilities.gather(1, torch.tensor(answer)[:, None])
            found[which] = (-picked[:, 0]).tolist()
        return [
            {"record_id": record["id"], "token": self._decode([token])}
            | {which: found[which][i] for which in MODELS}
            for i, token in enumerate(answer)
        ]

    def _complete(self, which: str, ids: list[int], **settings: Any) -> list[list[int]]:
        from capas.evaluation.generation import complete, generation_config

        config = generation_config(self.chat, self.max_new_tokens, **settings)
        with self._as(which) as model:
            return [completion.input_ids for completion in complete(model, [ids], config, 1)[0]]

    def _logits(self, which: str, ids: list[int], answer: list[int]) -> "torch.Tensor":
        """Return logits [answer + 1, vocabulary], for each token of the answer and the token after it."""
        import torch

        inputs = torch.tensor([ids + answer], device=self.tuned.model.device)
        with torch.inference_mode(), self._as(which) as model:
            return model(inputs).logits[0, len(ids) - 1 :].float().cpu()

    def _probabilities(self, logits: "torch.Tensor", input_ids: list[int]) -> Iterator[Row]:
        from capas.evaluation.generation import next_token_probabilities

        top = logits.topk(NUM_TOKENS).indices.tolist()
        settings = {
            name: s.without() for name, s in self.generation.settings.items() if s.do_sample
        }
        for name, setting in {"unchanged": {}, **settings}.items():
            found = next_token_probabilities(logits, input_ids, setting)
            for token in top:
                yield {
                    "setting": name,
                    "token": self._decode([token]),
                    "probability": float(found[token]),
                }

    def _as(self, which: str) -> AbstractContextManager[Any]:
        return self.tuned.base() if which == "base" else nullcontext(self.tuned.model)

    def _decode(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=False)
        return text


def last_trained(labels: list[int]) -> tuple[int, int]:
    """Return where the last sequence of trained tokens starts, and the position after its end."""
    end = max(i for i, label in enumerate(labels) if label != IGNORE_INDEX) + 1
    before = (i for i in range(end - 1, -1, -1) if labels[i] == IGNORE_INDEX)
    return next(before, -1) + 1, end


def seed_of(seed: int, prompt: Prompt, setting: str) -> int:
    """Return a 63-bit number for each seed, prompt and setting."""
    text = json.dumps([seed, prompt.messages, setting], ensure_ascii=False)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
