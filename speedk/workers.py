"""A pool of threads that do the pieces of one computation, on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

PIECE = 32 * 32 * 32
"""Pixels (count x height x width) of one thread's piece of a batch: 32 images of 32 x 32. A piece's activations stay
in the caches, which alone saves a quarter of the time."""


class Pool:
    """`threads` threads (default: as many as torch has), each of which computes on its own while the pool is entered.

    Pieces do not depend on the number of threads and come back in order, so neither does what is made of them. Where
    the device is not the CPU there are no threads, and pieces are as large as memory allows.
    """

    def __init__(self, device: torch.device, threads: int | None = None) -> None:
        self._threads = (threads or torch.get_num_threads()) if device.type == "cpu" else 0
        self._pool = None
        if self._threads > 1:
            self._pool = ThreadPoolExecutor(self._threads, initializer=torch.set_num_threads, initargs=(1,))
        self.piece = PIECE if self._threads else 16 * PIECE

    def __enter__(self) -> Pool:
        if self._threads:
            self._before = torch.get_num_threads()
            torch.set_num_threads(1)
        return self

    def __exit__(self, *_) -> None:
        if self._threads:
            torch.set_num_threads(self._before)

    def images(self, resolution: int) -> int:
        """Images of one piece, at least one."""
        return max(1, self.piece // resolution**2)

    def map(self, work: Callable[..., Any], items: Iterable[tuple]) -> list[Any]:
        """work(*item) for each item, in order."""
        if self._pool is None:
            return [work(*item) for item in items]
        return list(self._pool.map(lambda item: work(*item), list(items)))
