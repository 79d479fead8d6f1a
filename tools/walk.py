"""The commands of the package, one after another, for a few steps each on the embedded digits: does every part of the
way from images to a report run on this device? `python tools/walk.py cuda`; nothing of it is of any use as a result."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

from speedk import cli

FEW = ["images_per_class=4", "fit_steps=3"]
EXPERTS = ["expert_count=1", "max_start=1", "expert_epochs=1", "inner_steps=3"]


def commands(device: str, out: Path) -> list[list[str]]:
    """Each a command line; those that follow read what the first ones leave in `out`."""
    made, on = str(out / "speed-tm"), ["--device", device]
    quick = ["--runs", "1", "--epochs", "2", *on]
    found = []
    for method, fields in (("speed", FEW), ("pixels", [])):
        for objective, more in (("dm", []), ("dc", []), ("dsa", []), ("tm", EXPERTS)):
            found.append(["distill", "--method", method, "--objective", objective, "--steps", "2", "--out",
                          str(out / f"{method}-{objective}"), *on, *fields, *more])
    found += [
        ["distill", "--objective", "dm", "--steps", "2", "--out", str(out / "bf16"), *on, *FEW, "precision=bf16"],
        ["evaluate", made, "--networks", "convnet,mlp,resnet18,vit", *quick],
        ["evaluate", made, "--precision", "bf16", "--corruptions", *quick],
        ["evaluate", "--whole", "--dataset", "digits", *quick],
        ["continual", made, str(out / "pixels-dm"), *quick],
        ["experts", "--count", "1", "--epochs", "2", "--out", str(out / "experts"), *on],
        *(["coreset", "--method", method, "--epochs", "1", "--out", str(out / method), *on]
          for method in ("random", "herding", "kcenter", "kmeans", "forgetting")),
    ]
    return found


def main(device: str) -> int:
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SPEEDK_CACHE"] = str(Path(folder) / "cache")
        for words in commands(device, Path(folder)):
            started = time.monotonic()
            code = cli.main(words)
            failed += code != 0
            print(f"== exit code {code} after {time.monotonic() - started:.1f} s: speedk {' '.join(words)}", flush=True)
            if code == cli.INTERRUPTED:
                break
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else "cpu"))
