"""Score generated answers between two steps of a training, which continues as if nothing had happened."""

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from accelerate.utils import gather_object


class AnswerMetric(Protocol):
    """What the evaluation provides: `capas.training` generates nothing itself."""

    @property
    def name(self) -> str: ...

    def scores(self, model: Any, process: int, num_processes: int) -> list[float]:
        """Return the scores of this process's share of the answers."""
        ...


def mean_score(metric: AnswerMetric, model: Any, process: int, num_processes: int) -> float:
    """Return the mean of all answers' scores. Collective: every process must call it.

    The sum is exact, so it does not depend on the order of the processes.
    """
    with undisturbed(model):
        scores = metric.scores(model, process, num_processes)
    gathered = gather_object(scores)
    return math.fsum(gathered) / len(gathered)


@contextmanager
def undisturbed(model: Any) -> Iterator[None]:
    """Put the model into eval mode; afterwards restore its mode and the state of all random generators.

    Greedy decoding draws nothing, but a metric of the user's own may.
    """
    was_training, states = model.training, (random.getstate(), np.random.get_state())
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    model.eval()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        model.train(was_training)
        random.setstate(states[0])
        np.random.set_state(states[1])
