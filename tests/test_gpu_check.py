"""tools/gpu_check.sh keeps to its time and leaves a report, whatever happens: run with a Python that only pretends."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from speedk import cli

ROOT = Path(__file__).resolve().parents[1]
PYTHON = """#!/bin/bash
case " $* " in
    *" setup.py "*) part=build ;;
    *" bench/ "*) part=benches ;;
    *" tests/ops "*) part=tests ;;
    *tools/walk.py*) part=walk ;;
    *" -c "*|*tools/*) part=other ;;
esac
eval "${!part:-true}"
"""


def project(folder: Path) -> Path:
    for name in ("tools", "speedk", "kernels", "bench/results"):
        (folder / name).mkdir(parents=True)
    shutil.copy(ROOT / "tools/gpu_check.sh", folder / "tools")
    (folder / "python").write_text(PYTHON)
    (folder / "python").chmod(0o755)
    (folder / "bench/results/gpu-check.json").write_text("of another day")
    return folder


@pytest.fixture
def folder(tmp_path):
    return project(tmp_path)


def start(folder: Path, seconds: int, **parts: str) -> subprocess.Popen:
    """`parts`: what the parts of that name do, in the words of a shell."""
    environment = {**os.environ, **parts, "PYTHON": str(folder / "python"), "GPU_CHECK_SECONDS": str(seconds)}
    return subprocess.Popen(["bash", "tools/gpu_check.sh"], cwd=folder, env=environment, stdout=subprocess.DEVNULL)


def report(folder: Path) -> dict:
    return json.loads((folder / "bench/results/gpu-check.json").read_text())


def test_a_build_that_fails(folder):
    assert start(folder, 300, build="exit 3").wait(60) == 1
    said = report(folder)
    assert said["failed"] == ["build"] and not said["finished"]
    assert [part["exit_code"] for part in said["parts"]] == [0, 3]


def test_all_is_done(folder):
    start(folder, 300, tests="exit 1", walk="exit 1").wait(60)
    said = report(folder)
    failed = set(said["failed"]) - {"compute-sanitizer", "memcheck", "racecheck"}
    assert said["finished"] and failed == {"tests", "walk"}
    done = {part["part"] for part in said["parts"]}
    assert {"device", "build", "tests", "training", "walk", "warm", "benches"} <= done


def test_sanitizers_look_at_our_kernels_alone(folder, tmp_path):
    (folder / "bin").mkdir()
    said = folder / "called.txt"
    fake = folder / "bin" / "compute-sanitizer"
    fake.write_text(f"""#!/bin/bash
if [ "$1" = --help ]; then
    echo "--kernel-name regex"
    for i in {{1..2000}}; do echo "--option-$i of which there are many"; done
else
    echo "$*" >> {said}
fi
""")
    fake.chmod(0o755)
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    start(folder, 300, PATH=path).wait(60)
    calls = said.read_text().splitlines()
    assert len(calls) == 2 and all("--kernel-name kns=speedk" in call for call in calls)


def test_parts_that_hang(tmp_path):
    limit, slow = 12, ("build", "tests", "benches", "other")
    running = {part: start(project(tmp_path / part), limit, **{part: "sleep 600"}) for part in slow}
    for part, process in running.items():
        assert process.wait(120) == 1, part
        said = report(tmp_path / part)
        assert said["seconds"] < limit + 6, part
        assert ("device" if part == "other" else part) in said["failed"]
        if part == "tests":  # there is still time for the benches
            assert said["finished"] and said["parts"][-1]["part"] == "benches"


def test_one_that_is_stopped(folder):
    running = start(folder, 300, build="sleep 3")
    time.sleep(1)
    running.send_signal(signal.SIGTERM)
    assert running.wait(60) == 143
    assert not report(folder)["finished"]


def test_the_walk_says_what_the_commands_understand(tmp_path):
    spec = importlib.util.spec_from_file_location("walk", ROOT / "tools" / "walk.py")
    walk = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(walk)
    lines = walk.commands("cuda", tmp_path)
    assert {words[0] for words in lines} == {"distill", "evaluate", "continual", "experts", "coreset"}
    for words in lines:
        parser = cli._parser({words[0]: cli._module(words[0])})
        args, rest = parser.parse_known_args(words)
        assert args.device == "cuda" and all("=" in word for word in rest)
    said = {words[i + 1] for words in lines for i, word in enumerate(words) if word in ("--objective", "--method")}
    shipped = {path.stem for folder in ("objectives", "parameterizations", "coresets")
               for path in (ROOT / "speedk" / "distillation" / folder).glob("[a-z]*.py")}  # fmt: skip
    assert said == shipped - {"base"}
