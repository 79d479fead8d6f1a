"""What a run of many codes holds beside them: their gradient and the optimiser's average, and no other copy."""

from __future__ import annotations

import pytest
import torch
from peaks import peak_bytes
from toys import DEVICES, make_real

from speedk.distillation import checkpoint, loop
from speedk.distillation.recipe import resolve

IMAGES, CODE = 4000, 2 * 64 * 64  # of a class, and entries of an image


def make_run(device: str) -> loop.Run:
    recipe = resolve({
        "data": {"ipc": 1, "budget": "off"},
        "parameterization": {"method": "speed", "images_per_class": IMAGES, "D": 8, "K": 64, "H": 2, "R": 1, "k": 4,
                             "patch": 2, "init": "random"},
        "objective": {"tm": {"steps": 3, "batch": 8, "inner_steps": 2, "network": "mlp", "optimizer": "sgd",
                             "momentum": 0.5, "max_start": 1, "expert_epochs": 1}},
    }, "tm")
    run = loop.Run(recipe, make_real(classes=2).to(torch.device(device)), torch.device(device))
    run.initialise(loop.Progress())
    run.objective.pretend()
    return run


@pytest.mark.parametrize("device", DEVICES)
def test_a_run_holds_its_codes_three_times(device):
    run = make_run(device)
    codes = 4 * 2 * IMAGES * CODE
    assert codes == 4 * run.synthetic.scm.numel() > 250e6
    assert peak_bytes(run.advance, device) < 2.25 * codes  # the gradient, and the average that the first step begins
    assert peak_bytes(run.advance, device) < 0.25 * codes  # the gradient's room is free when the next begins
    assert peak_bytes(run.check, device) < 0.25 * codes


def test_a_checkpoint_is_written_from_where_the_tensors_lie(tmp_path):
    run = make_run("cpu")
    run.advance()
    size = sum(t.numel() * t.element_size() for t in run.synthetic.state_dict().values())
    assert peak_bytes(lambda: checkpoint.save(tmp_path, 1, run.state())) < 0.25 * size
    done, state = checkpoint.load_newest(tmp_path, torch.device("cpu"))
    assert done == 1
    again = make_run("cpu")
    again.restore(done, state)
    for name, value in run.synthetic.state_dict().items():
        assert torch.equal(again.synthetic.state_dict()[name], value), name


@pytest.mark.parametrize("device", DEVICES)
def test_the_penalty_in_pieces_is_the_penalty(device, monkeypatch):
    """Against autograd, in more pieces than one and on top of a gradient that is there already."""
    monkeypatch.setattr("speedk.distillation.parameterizations.speed.PENALISED", 3 * CODE)
    run = make_run(device)
    speed = run.synthetic
    with torch.no_grad():
        speed.scm[0, 0, 0, :5] = 0.0
    speed.penalty().backward()
    wanted, whole = speed.scm.grad + 1.0, float(speed.penalty().detach())
    speed.scm.grad = torch.ones_like(speed.scm)
    assert speed.accumulate_penalty() == pytest.approx(whole, rel=1e-5)
    assert torch.equal(speed.scm.grad, wanted)
