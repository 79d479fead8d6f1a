"""A pool of threads that do the pieces of one computation, on the CPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch

PIECE = 32 * 32 * 32
"""Pixels (count x height x width) of one thread's piece of a batch: 32 images of 32 x 32. A piece's activations stay
in the caches, which alone saves a quarter of the time."""


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
        self.threads = (threads or torch.get_num_threads()) if device.type == "cpu" else 0
        self.stopped = False
        self._pool = _shared(self.threads) if self.threads > 1 else None
        self.piece = PIECE if self.threads else 16 * PIECE

    def __enter__(self) -> Pool:
        if self.threads:
            self._before = torch.get_num_threads()
            torch.set_num_threads(1)
        return self

    def __exit__(self, *_) -> None:
        if self.threads:
            torch.set_num_threads(self._before)

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
    return ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))
