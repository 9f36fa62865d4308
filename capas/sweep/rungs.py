"""Record the rungs that a trial has reached: its scores after a part of its steps.

Successive halving (Jamieson and Talwalkar 2016, "Non-stochastic best arm identification and hyperparameter
optimization", AISTATS) trains all settings for a few steps and goes on with the best. A grid waits until all
have reached a rung (`halving`); a search, whose trials do not exist yet, decides for each by those before it
(Li et al. 2020, "A system for massively parallel hyperparameter tuning", MLSys).
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Self

from capas.core.files import write_whole
from capas.training.pause import score_file

_FOLDER = "rungs"
_OF_A_RUNG = "train.validation_"  # the metrics that a pause scores
LOSS = "train.validation_loss"


@dataclass(frozen=True)
class Rung:
    """The scores of a trial after `step` of its `num_steps` steps, named as in reports/metrics/train.json."""

    step: int
    num_steps: int
    scores: dict[str, float]

    @classmethod
    def read(cls, checkpoints: Path, fraction: Fraction) -> Self | None:
        """Return what the training wrote when it paused, None if it has not."""
        file = next(checkpoints.glob(f"train-*/{score_file(fraction)}"), None)
        if file is None:
            return None
        facts = json.loads(file.read_text(encoding="utf-8"))
        return cls(facts.pop("step"), facts.pop("num_steps"), facts)


@dataclass
class Ladder:
    """The rungs of a trial, {"1/9": Rung}, and the one at which a search dropped it.

    They outlive the state of the trial, so that a sweep that is started again decides as before.
    """

    file: Path
    rungs: dict[str, Rung]
    dropped_at: str | None = None
    train_key: str = ""
    seconds: float = 0.0

    @classmethod
    def of(cls, plan_folder: Path, identity: str) -> Self:
        file = plan_folder / _FOLDER / f"{identity}.json"
        if not file.exists():
            return cls(file, {})
        facts = json.loads(file.read_text(encoding="utf-8"))
        rungs = {name: Rung(**rung) for name, rung in facts.pop("rungs").items()}
        return cls(file, rungs, **facts)

    def write(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        facts = asdict(self)
        del facts["file"]
        write_whole(self.file, json.dumps(facts) + "\n")

    @property
    def last(self) -> Rung | None:
        """The furthest rung that was reached."""
        return max(self.rungs.values(), key=lambda rung: rung.step, default=None)


def fractions(settings: Mapping[str, Any]) -> list[Fraction]:
    """Return the parts of all steps after which trials are compared, ascending, without the whole.

    >>> fractions({"rungs": 3, "reduction_factor": 3})
    [Fraction(1, 9), Fraction(1, 3)]
    """
    number = settings["rungs"] or 1
    return [Fraction(1, settings["reduction_factor"] ** left) for left in range(number - 1, 0, -1)]


def metric_of(settings: Mapping[str, Any]) -> str:
    """Return the metric that decides at a rung: the objective, or the validation loss if a pause lacks it."""
    objective: str = settings["objective"]
    return objective if objective.startswith(_OF_A_RUNG) else LOSS


def score_of(rung: Rung, settings: Mapping[str, Any]) -> float:
    """Return the score that decides, which is better if it is lower."""
    return sign_of(settings) * rung.scores[metric_of(settings).partition(".")[2]]


def sign_of(settings: Mapping[str, Any]) -> float:
    """Return the factor that makes a lower score the better one."""
    return 1.0 if metric_of(settings) == LOSS else -1.0


def num_going_on(count: int, factor: int) -> int:
    """Return how many of `count` go on: one in `factor`, rounded down, but at least one."""
    return max(1, count // factor)


def share_of_steps(count: int, settings: Mapping[str, Any], with_default: bool) -> Fraction:
    """Return the most steps that `count` settings take, as a part of those of training all to their end.

    Args:
        with_default: the values of conf/ are among them, and train to the end beside the best.
    """
    total, left, best, before = Fraction(0), count, count, Fraction(0)
    for fraction in [*fractions(settings), Fraction(1)]:
        total += left * (fraction - before)
        best = num_going_on(best, settings["reduction_factor"])
        left, before = min(left, best + with_default), fraction
    return total / count


def is_among_best(
    plan_folder: Path, this: Ladder, fraction: Fraction, settings: Mapping[str, Any]
) -> bool:
    """Return whether a trial of a search is among the best that have reached this rung."""
    ladders = (Ladder.of(plan_folder, file.stem) for file in this.file.parent.glob("*.json"))
    scores = sorted(_scores(ladders, str(fraction), settings))
    last = scores[num_going_on(len(scores), settings["reduction_factor"]) - 1]
    return score_of(this.rungs[str(fraction)], settings) <= last


def _scores(ladders: Iterable[Ladder], name: str, settings: Mapping[str, Any]) -> Iterable[float]:
    return (score_of(ladder.rungs[name], settings) for ladder in ladders if name in ladder.rungs)
