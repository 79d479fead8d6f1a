"""Progress bars of a run."""

from __future__ import annotations

from speedk.distillation.loop import Progress


class Bars:
    """A bar while experts are trained, one while the start is fitted, and one over the outer iterations."""

    def __init__(self) -> None:
        self._bar = None
        self._name = ""

    def progress(self) -> Progress:
        return Progress(experts=self._experts, fit=self._fit, step=self._step, say=self._say)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _experts(self, done: int, total: int, numbers: dict[str, float]) -> None:
        self._show("training experts", done, total, numbers, "epoch")

    def _fit(self, done: int, total: int, numbers: dict[str, float]) -> None:
        self._show("fitting to real images", done, total, numbers)

    def _step(self, done: int, total: int, numbers: dict[str, float]) -> None:
        self._show("distilling", done, total, numbers)

    def _say(self, line: str) -> None:
        self.close()
        print(line, flush=True)

    def _show(self, name: str, done: int, total: int, numbers: dict[str, float], unit: str = "step") -> None:
        from tqdm import tqdm

        if self._bar is None or self._name != name:
            self.close()
            self._bar = tqdm(total=total, desc=name, initial=done - 1, unit=unit, dynamic_ncols=True)
            self._name = name
        self._bar.update(done - self._bar.n)
        self._bar.set_postfix({name: f"{value:.4g}" for name, value in numbers.items()}, refresh=False)
