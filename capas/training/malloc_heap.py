"""Measure what glibc's malloc holds for blocks of given sizes and lifetimes: more than their sum.

A freed block leaves a hole in the heap, and the next tensor often does not fit into it. On a CPU a training
step therefore takes up to twice the bytes that its small tensors need (measured; blocks of 32 MiB or more are
mapped separately and returned at once). No formula gives this amount, so malloc itself is measured: it
allocates blocks as for the tensors, but nothing is written to them, which takes addresses and no memory. This
happens in a child process, so that the caller's heap stays as it is.
"""

import ctypes
import multiprocessing
import sys
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

_MAPPED = 32 * 2**20  # the upper limit of M_MMAP_THRESHOLD
_LONGEST_SECONDS = 300.0  # time limit of the child
_ALIGNMENT = 64  # as in c10's allocator for the CPU

Answer = TypeVar("Answer")


class _Info(ctypes.Structure):
    """The `struct mallinfo2` of malloc.h."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


class Heap:
    """The heap of this process. `most` is the most bytes that malloc held beyond those at the beginning."""

    def __init__(self) -> None:
        self._libc = _libc()
        self._mapped = self.most = 0
        self._before = self._held()

    def take(self, num_bytes: int) -> Callable[[], None]:
        """Allocate a block and return a function that frees it."""
        if num_bytes >= _MAPPED:
            self._mapped += num_bytes
            give_back = self._unmap(num_bytes)
        else:
            give_back = self._block(num_bytes)
        self.most = max(self.most, self._held() - self._before + self._mapped)
        return give_back

    def _unmap(self, num_bytes: int) -> Callable[[], None]:
        def give_back() -> None:
            self._mapped -= num_bytes

        return give_back

    def _block(self, num_bytes: int) -> Callable[[], None]:
        block, free = ctypes.c_void_p(), self._libc.free
        if self._libc.posix_memalign(ctypes.byref(block), _ALIGNMENT, max(1, num_bytes)):
            return self._unmap(0)  # no addresses left: the block is not counted
        return lambda: free(block)

    def _held(self) -> int:
        info = self._libc.mallinfo2()
        return int(info.arena + info.hblkhd)


def is_known() -> bool:
    """Return whether malloc is glibc's and reports what it holds: on Linux, but not on Alpine."""
    return sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallinfo2")


def in_child(work: Callable[[], Answer]) -> Answer:
    """Return the result of `work()`, which runs in a fork of this process and is pickled.

    Raises:
        RuntimeError: `work` raised, or its process ended or did not answer in time.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def run() -> None:
        try:
            sender.send((work(), None))
        except Exception as error:  # noqa: BLE001  raised again by the caller
            sender.send((None, f"{type(error).__name__}: {error}"))

    process = context.Process(target=run)
    with warnings.catch_warnings():
        # Python 3.12 warns about forking a process with threads; the child takes none of their locks.
        warnings.simplefilter("ignore", DeprecationWarning)
        process.start()
    sender.close()
    answer, problem = None, "the process that measures did not answer"
    if receiver.poll(_LONGEST_SECONDS):
        try:
            answer, problem = receiver.recv()
        except EOFError:
            problem = "the process that measures ended"
    else:
        process.kill()
    process.join()
    if problem:
        raise RuntimeError(problem)
    return answer  # type: ignore[return-value]


def _libc() -> Any:
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = _Info
    libc.free.argtypes = [ctypes.c_void_p]
    libc.posix_memalign.argtypes = [
        ctypes.POINTER(ctypes.c_void_p),
        ctypes.c_size_t,
        ctypes.c_size_t,
    ]
    return libc
