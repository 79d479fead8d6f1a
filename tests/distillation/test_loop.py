"""Whole runs: they learn, repeat, resume to the same bits, and stop with a line that helps."""

import dataclasses
import json
import os
import signal
import threading

import kill_and_resume
import pytest
import torch
from kill_and_resume import TABLES
from toys import make_real

import speedk
from speedk.distillation import checkpoint, loop
from speedk.distillation.parameterizations import _fit
from speedk.distillation.recipe import resolve
from speedk.errors import ConfigError, Interrupted, TrainingError
from speedk.workers import Pool

PIXELS = {"data": {"ipc": 2}, "parameterization": {"method": "pixels"},
          "objective": {"dm": {"steps": 8, "batch": 8, "rates": {"pixels": 1.0}}}}


@pytest.fixture(scope="module")
def real():
    return make_real()


def small(steps=6, **overrides):
    return resolve(TABLES, "dm", {"steps": steps, **overrides})


def test_a_run_leaves_what_it_says(real, tmp_path):
    path = loop.distill(small(preview_every=2), real, tmp_path / "run", chosen="as asked")
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert names == {"distilled.safetensors", "recipe.toml", "data.json", "log.jsonl", "preview.png", "checkpoints",
                     "tensorboard", ".lock"}
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [1, 2, 3, 4, 5, 6] and {"loss", "penalty"} <= set(log[0])
    assert list((tmp_path / "run/tensorboard").glob("events*"))
    loaded = speedk.load(path)
    assert loaded.images().shape == (12, 3, 16, 16) and loaded.header["chosen"] == "as asked"
    assert loaded.header["objective"] == {"name": "dm", "lr": 0.01}


@pytest.mark.parametrize("tables", [TABLES, PIXELS], ids=["speed", "pixels"])
def test_matching_lowers_the_loss(real, tables, tmp_path):
    loop.distill(resolve(tables, "dm", {"steps": 40, "augment": False}), real, tmp_path / "run")
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


def test_equal_runs_give_equal_bytes_and_seeds_matter(real, tmp_path):
    files = [loop.distill(small(seed=seed), real, tmp_path / name).read_bytes()
             for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    assert files[0] == files[1] != files[2]


def test_the_artifact_is_what_the_finished_run_decodes(real, tmp_path):
    run = loop.Run(small(), real, torch.device("cpu"))
    run.initialise(loop.Progress())
    run.synthetic.finalize()
    index = torch.arange(run.synthetic.size)
    expected = run.synthetic.decode(index)[0]
    path = loop.distill(small(steps=0), real, tmp_path / "run")
    assert torch.equal(speedk.load(path).images(), expected)


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_signal_finishes_the_step_and_resumes(real, tmp_path, stop):
    whole = loop.distill(small(), real, tmp_path / "whole").read_bytes()

    def interrupt(done, *_):
        if done == stop:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match=f"stopped at step {stop} of 6"):
        loop.distill(small(), real, tmp_path / "run", progress=loop.Progress(step=interrupt))
    assert signal.getsignal(signal.SIGINT) is before
    said = []
    path = loop.distill(small(), real, tmp_path / "run", resume=True, progress=loop.Progress(say=said.append))
    assert path.read_bytes() == whole and said == [f"resuming at step {stop} of 6"]


def test_kills_at_random_moments():
    assert kill_and_resume.main(kills=5, seed=1)


def test_a_finished_run_resumes_to_itself_and_can_be_lengthened(real, tmp_path):
    path = loop.distill(small(), real, tmp_path / "run")
    before = path.read_bytes()
    path.unlink()
    assert loop.distill(small(), real, tmp_path / "run", resume=True).read_bytes() == before
    longer = loop.distill(small(steps=9), real, tmp_path / "run", resume=True).read_bytes()
    assert longer == loop.distill(small(steps=9), real, tmp_path / "other").read_bytes()


def test_a_torn_checkpoint_falls_back_to_the_one_before(real, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    whole = loop.distill(small(), real, tmp_path / "run").read_bytes()
    newest = sorted((tmp_path / "run/checkpoints").iterdir())
    assert len(newest) == checkpoint.KEEP
    newest[-1].write_bytes(newest[-1].read_bytes()[:-7])
    said = []
    assert loop.distill(small(), real, tmp_path / "run", resume=True,
                        progress=loop.Progress(say=said.append)).read_bytes() == whole
    assert said == ["resuming at step 5 of 6"]
    for path in sorted((tmp_path / "run/checkpoints").iterdir()):
        path.write_bytes(b"\0" * 100)
    with pytest.raises(TrainingError, match="no checkpoint can be read"):
        loop.distill(small(), real, tmp_path / "run", resume=True)


def test_a_run_is_never_overwritten_or_mixed(real, tmp_path):
    out = tmp_path / "run"
    loop.distill(small(), real, out)
    with pytest.raises(ConfigError, match="already holds a run; say --resume"):
        loop.distill(small(), real, out)
    with pytest.raises(ConfigError, match=r"parameterization.k=6, not 5"):
        loop.distill(small(k=5), real, out, resume=True)
    with pytest.raises(ConfigError, match="was begun on other data"):
        loop.distill(small(), make_real(seed=1), out, resume=True)


def test_two_processes_do_not_share_a_directory(real, tmp_path):
    busy, done = threading.Event(), threading.Event()

    def hold(step, *_):
        busy.set()
        done.wait(30)

    first = threading.Thread(target=loop.distill, args=(small(steps=1), real, tmp_path / "run"),
                             kwargs={"progress": loop.Progress(step=hold)})
    first.start()
    assert busy.wait(30)
    try:
        with pytest.raises(ConfigError, match="another process is distilling"):
            loop.distill(small(), real, tmp_path / "run", resume=True)
    finally:
        done.set()
        first.join()


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_step(real, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    step = loop.Run.advance

    def poisoned(run):
        if run.done == 3:
            with torch.no_grad():
                run.synthetic.saet.fill_(float("inf"))
        return step(run)

    monkeypatch.setattr(loop.Run, "advance", poisoned)
    with pytest.raises(TrainingError, match=r"is nan at step 4: .*lower them.*the last good checkpoint is of step 2"):
        loop.distill(small(sparse="end"), real, tmp_path / "run")
    monkeypatch.undo()
    assert loop.distill(small(sparse="end"), real, tmp_path / "run", resume=True).read_bytes() == loop.distill(
        small(sparse="end"), real, tmp_path / "other").read_bytes()


@pytest.mark.parametrize("tables, rate", [(TABLES, "scm"), (PIXELS, "pixels")], ids=["speed", "pixels"])
@pytest.mark.parametrize("steps", [1, 5])
def test_a_set_that_is_of_no_use_is_never_saved(real, tmp_path, monkeypatch, tables, rate, steps):
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", -1.0)
    recipe = resolve(tables, "dm", {"steps": steps, "schedule": "constant", f"rates.{rate}": 1e9})
    with pytest.raises(TrainingError, match=rf"after step 1: .*as in rates.{rate}=\S+, now 1e\+09.*is of step 0"):
        loop.distill(recipe, real, tmp_path / "run")
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000000.safetensors"]
    assert not (tmp_path / "run/distilled.safetensors").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_start_is_fitted_is_one_line(real, tmp_path, number):
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match="stopped before step 1"):
        loop.distill(small(), real, tmp_path / "run",
                     progress=loop.Progress(fit=lambda *_: os.kill(os.getpid(), number)))
    assert signal.getsignal(number) is before
    whole = loop.distill(small(), real, tmp_path / "whole").read_bytes()
    assert loop.distill(small(), real, tmp_path / "run", resume=True).read_bytes() == whole


def test_a_full_disk_is_one_line(real, tmp_path, monkeypatch):
    import errno

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TrainingError, match="No space left on device; free some space"):
        loop.distill(small(), real, tmp_path / "run")


def test_the_cosine_schedule_ends_at_zero_and_resumes(real, tmp_path):
    run = loop.Run(small(steps=4, schedule="cosine"), real, torch.device("cpu"))
    run.initialise(loop.Progress())
    went_by = []
    for _ in range(4):
        run.advance()
        went_by.append([group["lr"] for group in run.optimizer.param_groups])
    full = [group["lr"] for group in run.synthetic.param_groups()]
    for rates, share in zip(went_by, (1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2), strict=True):
        assert rates == pytest.approx([share * rate for rate in full])

    second = loop.Run(run.recipe, real, torch.device("cpu"))
    second.initialise(loop.Progress())
    second.advance()
    third = loop.Run(run.recipe, real, torch.device("cpu"))
    third.restore(1, second.state())
    for _ in range(3):
        third.advance()
    assert all(torch.equal(a, b) for a, b in zip(third.synthetic.parameters(), run.synthetic.parameters(), strict=True))


def test_a_field_that_cannot_be_is_refused_before_anything_is_made(real, tmp_path):
    with pytest.raises(ConfigError, match="init='nois' is not one of real, noise"):
        loop.distill(resolve(PIXELS, "dm", {"init": "nois"}), real, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_rates_must_name_a_group(real, tmp_path):
    with pytest.raises(ConfigError, match="no parameter group 'smc'.*did you mean 'scm'"):
        loop.distill(small(**{"rates.smc": 0.1}), real, tmp_path / "run")


def test_a_run_out_of_minutes_leaves_a_file_that_says_so_and_goes_on(real, tmp_path):
    whole = loop.distill(small(), real, tmp_path / "whole").read_bytes()
    partial = speedk.load(loop.distill(small(), real, tmp_path / "run", minutes=0))
    assert partial.header["objective"] == {"name": "dm", "lr": 0.01, "steps": 1}
    assert partial.header["recipe"]["objective"]["steps"] == 6
    assert loop.distill(small(), real, tmp_path / "run", resume=True).read_bytes() == whole


def test_the_public_function_takes_minutes(tmp_path):
    asked = {"method": "pixels", "steps": 3, "device": "cpu", "batch": 8, "out": tmp_path / "run"}
    part = speedk.load(speedk.distill("digits", minutes=0, **asked))
    assert part.header["objective"]["steps"] == 1
    assert "steps" not in speedk.load(speedk.distill("digits", resume=True, **asked)).header["objective"]


def test_the_start_is_fitted_to_images_from_all_over_a_class():
    """Two far-off kinds of images in each class, one of them rare: centres find both, and none is fitted twice."""
    real = make_real()
    spec = small(steps=0).parameterization
    rows = real.train.labels == 0
    images = real.train.images.clone()
    odd = rows.nonzero()[:2, 0]
    images[odd] = 255 - images[odd] // 8
    changed = dataclasses.replace(real, train=dataclasses.replace(real.train, images=images))
    with Pool(torch.device("cpu")) as pool:
        chosen = _fit._targets(spec, changed, torch.Generator().manual_seed(0), pool)
    count = spec.images_per_class
    assert chosen.shape[0] == count * real.geometry.classes and len(chosen.flatten(1).unique(dim=0)) == len(chosen)
    found = (chosen[:count, None] == changed.normalised("train", odd)[None]).flatten(2).all(-1)
    assert found.sum() == 1


def test_a_run_cannot_go_back_nor_change_the_rates_it_had(real, tmp_path):
    path = loop.distill(small(schedule="constant"), real, tmp_path / "run")
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="is at step 6 already: steps=3"):
        loop.distill(small(steps=3, schedule="constant"), real, tmp_path / "run", resume=True)
    assert path.read_bytes() == before
    loop.distill(small(schedule="cosine"), real, tmp_path / "falling")
    with pytest.raises(ConfigError, match="holds a run with objective.steps=6, not 9"):
        loop.distill(small(steps=9, schedule="cosine"), real, tmp_path / "falling", resume=True)


@pytest.mark.parametrize("name, content, message", [
    ("data.json", b"[]", "data.json is damaged"),
    ("data.json", b"", "data.json is damaged"),
    ("data.json", None, "holds checkpoints but no data.json"),
    ("recipe.toml", None, "holds checkpoints but no recipe.toml"),
    ("recipe.toml", b"run = 3", "run is no table"),
])
def test_a_damaged_run_directory_is_refused_in_a_line(real, tmp_path, name, content, message):
    path = loop.distill(resolve(PIXELS, "dm"), real, tmp_path / "run").with_name(name)
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        loop.distill(resolve(PIXELS, "dm"), real, tmp_path / "run", resume=True)


def test_checkpoints_of_another_run_are_refused_in_a_line(real, tmp_path):
    loop.distill(small(), real, tmp_path / "run")
    loop.distill(resolve(PIXELS, "dm"), real, tmp_path / "other")
    for path in (tmp_path / "other/checkpoints").iterdir():
        path.unlink()
    for path in (tmp_path / "run/checkpoints").iterdir():
        path.rename(tmp_path / "other/checkpoints" / path.name)
    with pytest.raises(TrainingError, match="step 6 in .* is not of this recipe"):
        loop.distill(resolve(PIXELS, "dm"), real, tmp_path / "other", resume=True)


def test_what_a_power_cut_left_of_the_log_is_dropped(real, tmp_path):
    loop.distill(small(), real, tmp_path / "run")
    log = tmp_path / "run/log.jsonl"
    whole = log.read_text()
    log.write_text(whole + "\0\0\0}\n{}\n[1]\nxx}\n{\"step\": 6")
    loop.distill(small(), real, tmp_path / "run", resume=True)
    assert log.read_text() == whole
