"""(a) The stage `train` of capas in a workspace of its own, with a clock in its Trainer.

    python train_capas.py SETTINGS.json

The workspace is the current folder; its params.yaml holds the settings.
"""

import runpy
import sys
from typing import Any

import race

from capas.models import hardware


def main() -> None:
    clock, prepare = race.Clock(), hardware.prepare

    def prepare_and_listen(*values: Any) -> Any:
        device = prepare(*values)  # before torch is imported
        import transformers

        make = transformers.Trainer.__init__

        def make_with_clock(self: Any, *args: Any, **kwargs: Any) -> None:
            make(self, *args, **kwargs)
            self.add_callback(clock.callback())

        transformers.Trainer.__init__ = make_with_clock
        return device

    hardware.prepare = prepare_and_listen
    sys.argv = ["stages/train_lora.py"]
    runpy.run_path("stages/train_lora.py", run_name="__main__")
    clock.show("capas")


if __name__ == "__main__":
    main()
