"""Ctrl-C and SIGTERM in a run."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any


class Stop:
    """Whether the run was asked to stop. `patient`: it looks by itself, so that a step is never torn; until then, and
    when it is asked again, KeyboardInterrupt is raised wherever it is."""

    def __init__(self) -> None:
        self.asked = self.patient = False

    def note(self, number: int, frame: object) -> None:
        again, self.asked = self.asked, True
        if again or not self.patient:
            raise KeyboardInterrupt


@contextlib.contextmanager
def noted() -> Iterator[Stop]:
    """Where Ctrl-C and SIGTERM are the run's."""
    stop = Stop()
    with _handled(stop.note, signal.SIGINT, signal.SIGTERM):
        yield stop


def terminated_as_interrupted() -> contextlib.AbstractContextManager[None]:
    """Inside, SIGTERM raises KeyboardInterrupt, as Ctrl-C does."""
    return _handled(signal.default_int_handler, signal.SIGTERM)


@contextlib.contextmanager
def _handled(handler: Callable[[int, Any], object], *numbers: int) -> Iterator[None]:
    previous = {}
    with contextlib.suppress(ValueError):  # not the main thread: signals are somebody else's
        previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)
