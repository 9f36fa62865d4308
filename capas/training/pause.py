"""Ask a training to pause at a checkpoint after a fraction of its steps: a rung of successive halving.

CAPAS_TRAIN_UNTIL=1/9 in the environment asks for it. It is no parameter: the training that goes on later is
the same experiment, with the learning rates of the whole schedule and the bytes of one that never paused.
"""

import math
import os
from fractions import Fraction

from capas.core.errors import CapasError

VARIABLE = "CAPAS_TRAIN_UNTIL"


def requested() -> Fraction | None:
    """Return the fraction of the steps at which the environment asks for a pause, or None.

    Raises:
        CapasError: the variable is no fraction between 0 and 1.
    """
    text = os.environ.get(VARIABLE)
    if text is None:
        return None
    try:
        found = Fraction(text)
    except (ValueError, ZeroDivisionError):
        found = Fraction(0)
    if not 0 < found < 1:
        raise CapasError(f"{VARIABLE}={text}: it must be a fraction between 0 and 1, such as 1/9")
    return found


def score_file(fraction: Fraction) -> str:
    """Return the name of the file, beside the checkpoints, with the scores at a pause."""
    return f"paused-{fraction.numerator}of{fraction.denominator}.json"


def step_of(fraction: Fraction, num_steps: int) -> int:
    """Return the step after which a training of `num_steps` pauses; the last step is no pause."""
    return math.ceil(fraction * num_steps)
