"""Trajectory matching: its loss and gradient against plain float64 loops, its experts, and what diverging does."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal

import pytest
import torch
import torch.nn.functional as F
from toys import DEVICES, make_real

import speedk
from speedk import networks
from speedk.distillation import checkpoint, experts, loop
from speedk.distillation import plan as plans
from speedk.distillation import recipe as recipes
from speedk.distillation.experts.folder import ExpertFolder, Identity
from speedk.distillation.objectives import tm
from speedk.distillation.objectives.base import Skip
from speedk.distillation.recipe import resolve
from speedk.errors import ConfigError, Interrupted, TrainingError

TM = {"steps": 4, "network": "mlp", "batch": 4, "inner_steps": 5, "max_start": 2, "expert_epochs": 2, "expert_count": 2,
      "expert_rate": 0.1, "expert_batch": 10, "synthetic_lr": 0.05, "rates": {"synthetic_lr": 1e-4}}


@pytest.fixture(scope="module")
def real():
    return make_real(resolution=8, count=8)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPEEDK_CACHE", str(tmp_path / "cache"))


def recipe(method="pixels", **overrides):
    sizes = {"pixels": {}, "speed": {"images_per_class": 4, "D": 8, "K": 8, "H": 2, "R": 1, "k": 6, "patch": 4,
                                     "fit_steps": 4}}
    tables = {"data": {"ipc": 3}, "parameterization": {"method": method, **sizes[method]}, "objective": {"tm": TM}}
    return resolve(tables, "tm", overrides)


def make_run(real, device="cpu", **overrides):
    run = loop.Run(recipe(**overrides), real, torch.device(device))
    run.initialise(loop.Progress())
    return run


def folder_of(real):
    path, = (experts.cache.folder() / "experts").iterdir()
    return ExpertFolder.open(path)


def test_convolutions_in_bf16_give_nearly_the_same_gradient(real):
    gradients = []
    for precision in ("float32", "bf16"):
        run = make_run(real, network="convnet", precision=precision)
        run.objective.step(run.synthetic, 0)
        gradients.append(run.synthetic.images.grad.flatten())
    cosine = torch.nn.functional.cosine_similarity(*gradients, dim=0).item()
    assert 0.98 < cosine < 1 - 1e-6
    with pytest.raises(ConfigError, match="precision=bf16 is for networks of speedk's convolutions .* mlp is not"):
        make_run(real, precision="bf16")
    with pytest.raises(ConfigError, match="precision='fp8' is not one of float32, bf16"):
        recipe(precision="fp8")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_loss_and_its_gradient_are_those_of_plain_loops(real, monkeypatch, momentum, device):
    run = make_run(real, device, augment=False, inner_momentum=momentum)
    schedules = []
    batches = tm.batches
    monkeypatch.setattr(tm, "batches", lambda *seen: schedules.append(batches(*seen)) or schedules[-1])
    numbers = run.objective.step(run.synthetic, 3)

    folder = folder_of(real)
    assert folder.numbers() == [0, 1] and folder.epochs(0) == 3  # max_start + expert_epochs - 1
    student = networks.fresh("mlp", real.geometry, 0).double()
    names, shapes = zip(*((name, p.shape) for name, p in student.named_parameters()), strict=True)
    images = run.synthetic.images.detach().cpu().double().requires_grad_()
    rate = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)
    losses = []
    for number in (0, 1):  # which of them was drawn shows in the loss
        for epoch in (0, 1):
            start, target = (folder.snapshot(number, e).double() for e in (epoch, epoch + 2))
            theta, m = start.clone().requires_grad_(), torch.zeros_like(start)
            for index in schedules[0]:
                parts = theta.split([shape.numel() for shape in shapes])
                values = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes)}
                logits = torch.func.functional_call(student, values, (images[index],))
                loss = F.cross_entropy(logits, run.synthetic.classes.cpu()[index])
                m = momentum * m + (1 - momentum) * torch.autograd.grad(loss, theta, create_graph=True)[0]
                theta = theta - rate * m
            losses.append((theta - target).square().sum() / (start - target).square().sum())
    loss = min(losses, key=lambda loss: abs(float(loss.detach()) - numbers["loss"]))
    assert float(loss.detach()) == pytest.approx(numbers["loss"], rel=1e-5)
    d_images, d_rate = torch.autograd.grad(loss, [images, rate])
    torch.testing.assert_close(run.synthetic.images.grad.cpu().double(), d_images, rtol=1e-3,
                               atol=1e-4 * float(d_images.abs().max()))
    torch.testing.assert_close(run.objective.learned()[0]["params"][0].grad.cpu().double(), d_rate, rtol=1e-3, atol=0)


def test_the_students_dropout_acts(real, monkeypatch):
    """As docs/guide.md has it: the students of the other objectives have none."""
    build, sizes = networks.build, {"dim": 16, "depth": 1, "heads": 1, "hidden": 8, "dropout": 0.5}
    monkeypatch.setattr(networks, "build", lambda name, geometry: build(name, geometry, **sizes))
    run = make_run(real, network="vit", augment=False)
    run.objective.pretend()  # one start and one target
    monkeypatch.setattr(tm, "batches", lambda *_: [torch.arange(run.synthetic.size)] * 5)
    losses = [run.objective.step(run.synthetic, step)["loss"] for step in (3, 3, 4)]
    assert losses[0] == losses[1] != losses[2]


def test_batches_are_pieces_of_permutations():
    drawn = tm.batches(10, 4, 8, torch.Generator().manual_seed(0))
    assert [len(part) for part in drawn] == [4, 4, 2] * 2 + [4, 4]
    for pass_ in (drawn[:3], drawn[3:6]):
        assert sorted(torch.cat(pass_).tolist()) == list(range(10))
    assert drawn[0].tolist() != drawn[3].tolist()
    assert [len(part) for part in tm.batches(3, 4, 2, torch.Generator())] == [3, 3]


@pytest.mark.parametrize("max_start", [1, 3])
def test_every_start_below_max_start_is_drawn(real, max_start):
    objective = make_run(real, max_start=max_start, expert_count=1).objective
    objective.prepare()
    starts = [objective._experts.snapshot(0, epoch) for epoch in range(max_start)]
    drawn = set()
    for step in range(40):
        start, target = objective._drawn(torch.Generator().manual_seed(step))
        epoch, = (e for e, there in enumerate(starts) if torch.equal(start, there))
        assert torch.equal(target, objective._experts.snapshot(0, epoch + 2))
        drawn.add(epoch)
    assert drawn == set(range(max_start))


@pytest.mark.parametrize("method", ["pixels", "speed"])
def test_matching_lowers_the_loss(real, tmp_path, method):
    rates = {"pixels": {"rates.pixels": 100.0}, "speed": {"optimizer": "adam", "rates.scm": 0.05}}[method]
    path = loop.distill(recipe(method, steps=60, augment=False, inner_momentum=0.0, **rates), real, tmp_path / "run")
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in log]
    assert sum(losses[-15:]) < 0.9 * sum(losses[:15])
    header = speedk.load(path).header
    assert header["objective"]["lr"] == pytest.approx(log[-1]["synthetic_lr"], rel=0.05) != 0.05
    assert header["objective"]["experts"] == folder_of(real).identity.key


@pytest.mark.parametrize(("network", "device"), [("mlp", "cpu"), *(("convnet", d) for d in DEVICES if d != "cpu")])
def test_a_stopped_run_resumes_to_the_same_bytes(real, tmp_path, network, device):
    def interrupt(done, *_):
        if done == 2:
            os.kill(os.getpid(), signal.SIGINT)

    made = recipe("speed", network=network)
    whole = loop.distill(made, real, tmp_path / "whole", device=device).read_bytes()
    with pytest.raises(Interrupted):
        loop.distill(made, real, tmp_path / "run", device=device, progress=loop.Progress(step=interrupt))
    assert loop.distill(made, real, tmp_path / "run", device=device, resume=True).read_bytes() == whole


def test_stopped_while_experts_train_it_goes_on(real, tmp_path):
    def interrupt(done, *_):
        raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="finished epochs of experts are kept"):
        loop.distill(recipe(), real, tmp_path / "run", progress=loop.Progress(experts=interrupt))
    seen = []
    path = loop.distill(recipe(), real, tmp_path / "run", resume=True,
                        progress=loop.Progress(experts=lambda done, total, _: seen.append(total)))
    assert 0 < len(seen) < 6 == 2 * 3
    assert path.read_bytes() == loop.distill(recipe(), real, tmp_path / "other").read_bytes()


def test_experts_of_a_folder_are_used_and_never_named(real, tmp_path):
    identity = Identity.of(real, network="mlp", rate=0.3, batch=5)
    folder = ExpertFolder.create(tmp_path / "mine", identity)
    experts.train(folder, real, 3, 3)
    path = loop.distill(recipe(experts=str(folder.path)), real, tmp_path / "run")
    assert not (tmp_path / "cache").exists()
    assert str(tmp_path).encode() not in path.read_bytes()
    moved = folder.path.rename(tmp_path / "moved")
    assert loop.distill(recipe(experts=str(moved)), real, tmp_path / "run", resume=True) == path
    other = ExpertFolder.create(tmp_path / "other", Identity.of(real, network="mlp", rate=0.1))
    experts.train(other, real, 2, 3)
    with pytest.raises(ConfigError, match="was begun with other experts than those in"):
        loop.distill(recipe(experts=str(other.path)), real, tmp_path / "run", resume=True)
    with pytest.raises(ConfigError, match="network=mlp, not convnet: say network=mlp"):
        loop.distill(recipe(experts=str(moved), network="convnet"), real, tmp_path / "new")
    with pytest.raises(ConfigError, match="there are no experts in .*nowhere: make them"):
        loop.distill(recipe(experts=str(tmp_path / "nowhere")), real, tmp_path / "newest")
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(ConfigError, match=r"holds experts with data="):
        loop.distill(recipe(experts=str(moved)), make_real(resolution=8, count=8, seed=1), tmp_path / "newer")


@pytest.mark.parametrize("limit", [1, 5 * 3 * 8 * 8 * 8])
def test_the_way_back_is_walked_in_chunks_under_a_limit(real, monkeypatch, limit):
    run = make_run(real, method="speed")
    run.synthetic.double()
    generator = torch.Generator().manual_seed(0)
    given, chunks = {}, []

    def match(start, target, images, *_):
        assert not images.grad_fn and images.dtype == torch.float64  # decoded without a graph
        given["d"] = torch.randn(images.shape, generator=generator, dtype=torch.float64)
        return 0.5, given["d"], None, torch.zeros(())

    monkeypatch.setattr(run.objective, "_match", match)
    monkeypatch.setattr(tm, "batches", lambda *_: [torch.arange(run.synthetic.size)])
    monkeypatch.setattr(tm, "DECODE_BYTES", limit)
    accumulate = run.synthetic.accumulate
    monkeypatch.setattr(run.synthetic, "accumulate", lambda index, *rest, **pool: (
        chunks.append(len(index)), accumulate(index, *rest, **pool)))
    run.objective.step(run.synthetic, 0)
    image = 8 * run.real.geometry.pixels  # bytes
    assert sum(chunks) == run.synthetic.size == 12 and max(chunks) == max(1, limit // image)
    assert max(chunks) * image <= max(limit, image)

    got = {name: p.grad.clone() for name, p in run.synthetic.named_parameters()}
    run.synthetic.zero_grad()
    (run.synthetic.decode(torch.arange(12))[0] * given["d"]).sum().backward()
    for name, p in run.synthetic.named_parameters():
        assert p.grad.abs().max() > 0
        torch.testing.assert_close(got[name], p.grad, rtol=1e-11, atol=1e-13)


def test_the_largest_row_fits_beside_its_own_parameters():
    """TinyImageNet at 10 images per class uses all its images in every iteration: they and their gradients are held,
    1.6 GB, and of the way back a chunk that is small beside the set's own numbers."""
    made = resolve(recipes.read("tinyimagenet-ipc10-speed"), "tm")
    geometry, spec = recipes.geometry(made), made.objective
    size = made.parameterization.images_per_class * geometry.classes
    assert size == 15_600
    drawn = tm.batches(size, spec.batch, spec.inner_steps, torch.Generator())
    needed, image = len(torch.unique(torch.cat(drawn))), 4 * geometry.pixels
    own = 4 * geometry.budget(made.data.ipc)
    assert needed == size and 2 * needed * image < 1.6e9
    rows = tm.DECODE_BYTES // image
    assert rows > 16 and rows * image < own / 5 < 2 * needed * image / 50


def test_what_it_needs_is_said_before_it_starts(real):
    objective = make_run(real).objective
    said, seconds = objective.preparation()
    assert said.startswith("2 experts of 3 epochs from ") and "6 of 6 epochs are to be trained" in said
    assert seconds > 0
    one = make_run(real, expert_count=1, max_start=1, expert_epochs=1).objective.preparation()[0]
    assert one.startswith("1 expert of 1 epoch from ") and "1 of 1 epoch is to be trained" in one
    promised = float(re.search(r"([\d.]+) MB of disk in all", said)[1])
    objective.prepare()
    files = sum(file.stat().st_size for file in folder_of(real).path.glob("expert-*.safetensors"))
    assert promised == pytest.approx(files / 1e6, rel=0.1)
    assert objective.preparation()[0].endswith("all are there") and objective.preparation()[1] == 0


def test_an_estimate_trains_no_experts_and_skips_nothing(real, tmp_path, monkeypatch):
    made = plans.Plan(recipe(synthetic_lr=0.5), real, torch.device("cpu"), tmp_path / "run", "", ())
    seen = []
    advance = loop.Run.advance
    monkeypatch.setattr(loop.Run, "advance", lambda run: seen.append(advance(run)) or seen[-1])
    assert plans.estimate(made).step_seconds > 0
    assert len(seen) == 4 and all(0.1 < numbers["loss"] < tm.DIVERGED for numbers in seen)  # not one was skipped
    assert not (tmp_path / "cache").exists() and not (tmp_path / "run").exists()


def test_a_diverging_student_is_skipped_and_the_rate_reined_in(real):
    run = make_run(real, synthetic_lr=1e6, steps=200)
    before = run.synthetic.images.detach().clone()
    rates = []
    for expected in range(1, tm.FAILURES):
        numbers = run.advance()
        rates.append(numbers["synthetic_lr"])
        assert numbers["skipped"] == expected and "loss" not in numbers and run.done == expected
    assert rates == [1e6 / 2**i for i in range(1, tm.FAILURES)]
    assert torch.equal(run.synthetic.images, before)
    with pytest.raises(TrainingError, match="diverged in 10 iterations one after another, to step 10.*lower synthetic"):
        run.advance()


def test_a_good_step_forgets_the_failures(real):
    run = make_run(real, synthetic_lr=100.0, synthetic_lr_floor=0.01)
    for _ in range(30):
        numbers = run.advance()
        if "loss" in numbers:
            break
    assert numbers["skipped"] >= 1 and run.objective.state_dict()["failures"] == 0
    state = run.objective.state_dict()
    fresh = make_run(real, synthetic_lr=100.0, synthetic_lr_floor=0.01)
    fresh.objective.load_state_dict(state)
    assert fresh.objective.state_dict() == state
    assert state["skipped"] == fresh.objective.skipped == numbers["skipped"]  # a resumed run goes on counting


def test_images_that_are_not_finite_stop_the_run(real):
    run = make_run(real)
    with torch.no_grad():
        run.synthetic.images[0] = float("inf")
    with pytest.raises(TrainingError, match="value of inf in the synthetic images at step 1: the outer rates are"):
        run.advance()


UNSTABLE = {"steps": 40, "rates.pixels": 1e4, "rates.synthetic_lr": 0.0, "synthetic_lr": 0.2,
            "synthetic_lr_floor": 0.2}
"""The images grow until every student diverges on them: two good iterations, five failures, one good, ten failures."""


def kept(path):
    """The failures that each checkpoint of a run knows of, by step."""
    found = {}
    for file in sorted((path / "checkpoints").iterdir()):
        step, state = checkpoint._load(file, torch.device("cpu"))
        found[step] = state["objective"]["failures"]
        assert state["synthetic"]["images"].abs().max() < 1e4
    return found


def test_images_that_a_student_diverges_on_are_told_from_a_high_rate(real, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", -1.0)
    out = tmp_path / "run"
    with pytest.raises(TrainingError) as stop:
        loop.distill(recipe(**UNSTABLE), real, out)
    line = str(stop.value)
    assert "on synthetic images that reach" in line and "the outer rates are too high" in line
    assert "as in rates.pixels=1000, now 10000" in line and "lower synthetic_lr" not in line
    assert not (out / "distilled.safetensors").exists()
    (step, failures), = kept(out).items()
    assert step > 0 and failures == 0
    # What the line advises can be followed.
    assert f"checkpoint is of step {step}" in line and f"--resume --steps {step} makes a file" in line
    loaded = speedk.load(loop.distill(recipe(**UNSTABLE | {"steps": step}), real, out, resume=True))
    assert bool(loaded.images().isfinite().all())


def test_stopped_while_it_diverges_it_keeps_what_was_before(real, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", -1.0)

    def interrupt(done, *_):
        if done == 5:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="stopped at step 5 of 40, saved as of step 2, as it diverges since"):
        loop.distill(recipe(**UNSTABLE), real, tmp_path / "run", progress=loop.Progress(step=interrupt))
    assert set(kept(tmp_path / "run").values()) == {0}
    with pytest.raises(TrainingError) as whole:
        loop.distill(recipe(**UNSTABLE), real, tmp_path / "whole")
    with pytest.raises(TrainingError) as resumed:
        loop.distill(recipe(**UNSTABLE), real, tmp_path / "run", resume=True)
    assert str(resumed.value).replace("run/", "whole/") == str(whole.value)


def test_at_the_least_rate_a_lower_one_is_not_advised(real):
    run = make_run(real, synthetic_lr=1e3, synthetic_lr_floor=1e3)
    with pytest.raises(TrainingError, match="least that synthetic_lr_floor allows: lower synthetic_lr_floor"):
        for _ in range(tm.FAILURES):
            run.advance()


def test_a_run_that_skips_every_iteration_leaves_no_file(real, tmp_path):
    with pytest.raises(TrainingError, match="diverged in all 4 iterations, so nothing was learned: lower synthetic_lr"):
        loop.distill(recipe(synthetic_lr=1e6), real, tmp_path / "run")
    assert not (tmp_path / "run/distilled.safetensors").exists()


def test_skipped_iterations_are_said_at_the_end(real, tmp_path):
    said = []
    loop.distill(recipe(synthetic_lr=100.0, steps=30), real, tmp_path / "run", progress=loop.Progress(say=said.append))
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    skipped = sum("loss" not in line for line in log)
    assert skipped and [line for line in said if line.startswith(f"skipped {skipped} of 30 iterations")]


def test_the_rate_stays_above_its_floor(real):
    run = make_run(real, **{"rates.synthetic_lr": 1e6, "synthetic_lr_floor": 0.04})
    lowest = []
    for _ in range(6):
        with contextlib.suppress(Skip):
            run.objective.step(run.synthetic, run.done)
        run.optimizer.step()
        run.objective.after_update()
        lowest.append(run.objective.artifact_fields()["lr"])
    assert min(lowest) >= 0.04 - 1e-9


@pytest.mark.parametrize("field,value", [
    ("rates.pixels", 1e45), ("rates.synthetic_lr", 1e38), ("rates.pixels", -1.0), ("synthetic_lr", 1e38),
    ("batch", 0), ("inner_steps", 0), ("inner_momentum", 1.0), ("max_start", 0), ("expert_epochs", 0),
    ("synthetic_lr", 0.0), ("expert_rate", -0.1), ("expert_count", 0), ("synthetic_lr_floor", 1.0),
])
def test_fields_that_cannot_be_are_refused(field, value):
    with pytest.raises(ConfigError, match=field):
        recipe(**{field: value})
