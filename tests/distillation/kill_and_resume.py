"""Kill a run at random moments (SIGKILL), resume it each time, and compare its file with an uninterrupted run's.

    python tests/distillation/kill_and_resume.py --kills 20

Prints where each kill fell and exits with 1 where the bytes differ. The tests run it with fewer kills.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TABLES = {
    "data": {"ipc": 4},
    "parameterization": {"method": "speed", "images_per_class": 4, "D": 8, "K": 8, "H": 2, "R": 1, "k": 6, "patch": 4,
                         "fit_steps": 20},
    "objective": {"dm": {"optimizer": "adam", "steps": 60, "batch": 8}},
    "run": {"preview_every": 7},
}


def child(out: Path) -> None:
    """One process of the run, which checkpoints far more often than a real one, so that kills fall everywhere."""
    import torch
    from toys import make_real

    from speedk.distillation import loop
    from speedk.distillation.recipe import resolve

    torch.set_num_threads(2)
    loop.CHECKPOINT_SECONDS = 0.05
    print("ready", flush=True)
    loop.distill(resolve(TABLES, "dm"), make_real(), out, resume=True,
                 progress=loop.Progress(step=lambda done, *_: print(done, flush=True)))
    print("end", flush=True)


def run(out: Path, kill_after: float | None) -> str:
    """The last line of a process that is killed `kill_after` seconds after it is ready (None: not at all)."""
    process = subprocess.Popen([sys.executable, __file__, "--child", str(out)], stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    if kill_after is not None:
        time.sleep(kill_after)
        process.kill()
    last = ["ready", *process.stdout.read().split("\n")][-2:]
    if process.wait() not in (0, -9):
        raise SystemExit(f"a run failed with exit code {process.returncode}")
    return last[0] or "ready"


def main(kills: int, seed: int) -> bool:
    """Whether the interrupted run ended in the bytes of the other."""
    with tempfile.TemporaryDirectory() as folder:
        whole, broken = Path(folder) / "whole", Path(folder) / "broken"
        began = time.monotonic()
        run(whole, None)
        length = time.monotonic() - began
        moments = random.Random(seed)
        for number in range(kills):
            # Squared: many kills early (before the first checkpoint too), some after the end.
            moment = moments.random() ** 2 * 0.6 * length
            print(f"kill {number + 1}: after {moment:.2f} s, at step {run(broken, moment)}", flush=True)
        run(broken, None)
        same = all((whole / name).read_bytes() == (broken / name).read_bytes()
                   for name in ("distilled.safetensors", "preview.png", "recipe.toml", "log.jsonl"))
        print("the same bytes" if same else "the bytes differ")
        return same


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", type=Path)
    args = parser.parse_args()
    if args.child is not None:
        child(args.child)
    else:
        sys.exit(0 if main(args.kills, args.seed) else 1)
