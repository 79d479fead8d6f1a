"""Ctrl-C and SIGTERM in a run."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator


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
    stop, previous = Stop(), {}
    with contextlib.suppress(ValueError):  # not the main thread: signals are somebody else's
        previous = {number: signal.signal(number, stop.note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt, as Ctrl-C does."""
    previous = None
    with contextlib.suppress(ValueError):  # not the main thread: signals are somebody else's
        previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)
