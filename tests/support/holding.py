"""stages/train_lora.py, which waits behind the step of HOLD_AT until SIGTERM has reached it, or HELD is gone.

A test ends the training while it waits: HELD says so, and on no machine, however busy, does it end before.
"""

import os
import time
from pathlib import Path
from typing import Any

from capas.training import launch
from stages import train_lora

HELD, AT = Path(".dvc/tmp/held"), "HOLD_AT"
_SECONDS = 300  # of a test that died
_make_trainer = train_lora.make_trainer


def make_trainer(*args: Any, **kwargs: Any) -> Any:
    """As the stage's, in whose first process a callback waits."""
    from transformers import TrainerCallback

    trainer = _make_trainer(*args, **kwargs)

    class Hold(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == int(os.environ[AT]):
                HELD.touch()
                end = time.monotonic() + _SECONDS
                while HELD.exists() and not trainer._checkpoints.terminated:
                    assert time.monotonic() < end
                    time.sleep(0.01)

    if launch.is_main():
        trainer.add_callback(Hold())
    return trainer


if __name__ == "__main__":
    train_lora.make_trainer = make_trainer
    launch.run("train", train_lora.main)
