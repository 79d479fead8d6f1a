"""A pool of threads that do the pieces of one computation, on the CPU."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch

POOL_PIECE_PIXELS = 32 * 32 * 32
"""Count x height x width of one thread's piece of a batch: 32 images of 32 x 32. A piece's activations stay in the
caches, which alone saves a quarter of the time."""


class Stopped(Exception):
    """Something else failed, or the user interrupted: whoever still uses the pool gives up."""


class Pool:
    """`threads` threads (default: as many as torch has), each of which computes on its own while the pool is entered.

    Pieces do not depend on the number of threads and come back in order, so neither does what is made of them. Pools
    of as many threads share them, so a piece must not wait for a pool itself. Where the device is not the CPU there are
    no threads (`threads` is 0), and pieces are as large as memory allows.
    """

    def __init__(self, device: torch.device, threads: int | None = None) -> None:
        self.device = device
        self.threads = (threads or _loan.number()) if device.type == "cpu" else 0
        self.stopped = False
        self._pool = _shared(self.threads) if self.threads > 1 else None
        self.piece = POOL_PIECE_PIXELS if self.threads else 16 * POOL_PIECE_PIXELS

    def __enter__(self) -> Pool:
        if self.threads:
            _loan.take()
        return self

    def __exit__(self, *_) -> None:
        if self.threads:
            _loan.give_back()

    def images(self, resolution: int) -> int:
        """Images of one piece, at least one."""
        return max(1, self.piece // resolution**2)

    def map(self, work: Callable[..., Any], items: Iterable[tuple]) -> list[Any]:
        """work(*item) for each item, in order. Raises Stopped once `stopped` is set."""
        if self.stopped:
            raise Stopped
        if self._pool is None:
            return [work(*item) for item in items]
        return list(self._pool.map(lambda item: work(*item), list(items)))


class _Loan:
    """torch's number of threads, on loan to the pools that are entered.

    Each thread of Python has a number of its own, but a new one begins with what was last said in any: with a pool's 1
    while another thread is in a pool. So the first one in notes what it found, which is also what such a thread has
    when it leaves; and as each that leaves says its number again, none of a pool's is left once the last is out.
    """

    def __init__(self) -> None:
        self._lock, self._own, self._entered, self._found = threading.RLock(), threading.local(), 0, 1

    def number(self) -> int:
        """Threads that torch has in this thread of Python, but for the pools of others."""
        with self._lock:
            now = torch.get_num_threads()
            own = now > 1 or not self._entered or self._numbers or hasattr(self._own, "single")
            return now if own else self._found

    def take(self) -> None:
        with self._lock:
            self._numbers.append(self.number())
            if not self._entered:
                self._found = self._numbers[-1]
            self._entered += 1
            torch.set_num_threads(1)

    def give_back(self) -> None:
        with self._lock:
            self._entered -= 1
            torch.set_num_threads(self._numbers.pop())

    def single(self) -> None:
        """This thread has one, whoever is in a pool."""
        self._own.single = True
        torch.set_num_threads(1)

    def forked(self) -> None:
        """The other threads are gone, and one of them may have held the lock."""
        self._lock, self._entered = threading.RLock(), len(self._numbers)

    @property
    def _numbers(self) -> list[int]:
        """Of this thread: what to say when it leaves the pools it is in, the outermost first."""
        return self._own.__dict__.setdefault("numbers", [])


_loan = _Loan()
os.register_at_fork(after_in_child=_loan.forked)


@cache
def _shared(count: int) -> ThreadPoolExecutor:
    """The threads of every pool of so many: a pool that is held and not used costs nothing."""
    return single_threaded(count)


os.register_at_fork(after_in_child=_shared.cache_clear)  # threads do not outlive a fork


def single_threaded(count: int) -> ThreadPoolExecutor:
    """A pool of threads in which torch uses one thread for an operation.

    Each thread has to say so for itself: what another one said reaches torch's own loops but not the BLAS, whose sums
    would then depend on the number of threads.
    """
    return ThreadPoolExecutor(count, initializer=_loan.single)
