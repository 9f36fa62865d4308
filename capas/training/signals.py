"""Handle SIGTERM and Ctrl-C during a training: save a checkpoint, then stop."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_SAVING = b"train: saving a checkpoint after this step; Ctrl-C again stops at once, without it\n"


@contextmanager
def on_signals(act: Callable[[str], None]) -> Iterator[None]:
    """Call act(name) in the block on SIGTERM and on the first Ctrl-C; the second Ctrl-C interrupts.

    Only the main thread may set handlers. If SIGINT is ignored (`nohup`, a shell's background job), it stays
    ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupted(*_: Any) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        act("Ctrl-C")
        os.write(2, _SAVING)  # log.info could wait for the lock of an interrupted log call

    before = {signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: act("SIGTERM"))}
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        before[signal.SIGINT] = signal.signal(signal.SIGINT, interrupted)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
