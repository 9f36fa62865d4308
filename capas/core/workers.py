"""Process chunks of work on several cores, and yield the results in order."""

import itertools
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from capas.core.cores import usable_cores
from capas.core.errors import CapasError

MAX_WORKERS = 8  # the process that reads and writes cannot keep more of them busy
CHUNKS_ALONE = 20  # chunks done before processes are started: a small data set needs none
_SECONDS_BETWEEN_LOOKS = 1.0
Chunk = TypeVar("Chunk")
Result = TypeVar("Result")


def in_order(
    work: Callable[[Chunk], Result], chunks: Iterable[Chunk], num_workers: int | None = None
) -> Iterator[Result]:
    """Yield work(chunk) for each chunk, in order; the results do not depend on the number of processes.

    Few chunks wait at any time. An exception from `work` or `chunks` is raised after the results before it.

    Args:
        num_workers: the number of processes, None for one per usable core, at most MAX_WORKERS.

    Raises:
        CapasError: a process was killed.
    """
    number = min(usable_cores(), MAX_WORKERS) if num_workers is None else num_workers
    chunks = iter(chunks)
    yield from map(work, itertools.islice(chunks, None if number < 2 else CHUNKS_ALONE))
    if following := list(itertools.islice(chunks, 1)):
        yield from _side_by_side(work, itertools.chain(following, chunks), number)


def _side_by_side(
    work: Callable[[Chunk], Result], chunks: Iterable[Chunk], number: int
) -> Iterator[Result]:
    context = multiprocessing.get_context("spawn")  # a fork would inherit locks held by threads
    executor = ProcessPoolExecutor(number, context, _begin, (os.getpid(),))
    waiting: deque[Future[Result]] = deque()
    try:
        for future in _submitted(executor, work, chunks):
            waiting.append(future)
            if len(waiting) > 2 * number:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise CapasError(
            f"one of {number} processes was killed, possibly out of memory; nothing was written. "
            "Free some memory and run it again"
        ) from None
    finally:
        executor.shutdown(cancel_futures=True)


def _submitted(
    executor: Executor, work: Callable[[Chunk], Result], chunks: Iterable[Chunk]
) -> Iterator[Future[Result]]:
    try:
        for chunk in chunks:
            yield executor.submit(_worked, work, chunk)
    except Exception as error:  # noqa: BLE001  raised again after the earlier results
        failed: Future[Result] = Future()
        failed.set_exception(error)
        yield failed


def _worked(work: Callable[[Chunk], Result], chunk: Chunk) -> Result:
    try:
        return work(chunk)
    except CapasError:
        raise
    except Exception:  # noqa: BLE001  not every exception can be pickled
        raise RuntimeError(traceback.format_exc()) from None


def _begin(parent: int) -> None:
    """Prepare a worker process: it ignores Ctrl-C, which the parent handles, and ends with the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with(parent)


def end_with(parent: int) -> None:
    """End this process, from now on, as soon as `parent`, which started it, has ended."""
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    os._exit(1)
