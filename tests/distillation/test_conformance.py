"""What every parameterization and every objective keeps to: a new file in their folders is tested here as it is."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from toys import make_real

import speedk
from speedk import registry
from speedk.distillation import artifact, loop, objectives, parameterizations
from speedk.distillation.recipe import resolve

# What makes those that are shipped quick, and what makes SPEED's gradient that of its decode, not one passed through.
SMALL = {"speed": {"images_per_class": 4, "D": 8, "K": 8, "H": 2, "R": 2, "k": 6, "patch": 4, "fit_steps": 4}}
EXACT = {"speed": {"sparse": "end"}}
QUICK = {
    "dm": {"batch": 4}, "dc": {"batch": 4}, "dsa": {"batch": 4},
    "tm": {"batch": 4, "network": "mlp", "inner_steps": 3, "max_start": 2, "expert_epochs": 1, "expert_count": 2},
}
METHODS = registry.names(parameterizations)
OBJECTIVES = registry.names(objectives)


@pytest.fixture(scope="module")
def real():
    return make_real()


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """A cache of these tests' own, which the experts of the first that needs them stay in."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPEEDK_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def make_run(real, method, objective="dm", **fields):
    tables = {"data": {"ipc": 4}, "parameterization": {"method": method, **SMALL.get(method, {})},
              "objective": {objective: {"steps": 2, **QUICK.get(objective, {})}}}
    run = loop.Run(resolve(tables, objective, fields), real, torch.device("cpu"))
    run.initialise(loop.Progress())
    return run


@pytest.mark.parametrize("method", METHODS)
def test_decode(real, method):
    synthetic = make_run(real, method).synthetic
    index = torch.tensor([0, synthetic.size - 1, 0])
    images, labels = synthetic.decode(index)
    assert images.shape == (3, 3, 16, 16) and images.dtype == torch.float32
    assert labels.shape[0] == 3 and synthetic.classes.tolist() == sorted(synthetic.classes.tolist())
    assert set(synthetic.classes.tolist()) == {0, 1, 2}
    everything, _ = synthetic.decode(torch.arange(synthetic.size))
    torch.testing.assert_close(everything[index], images)


@pytest.mark.parametrize("method", METHODS)
def test_accumulate_is_the_gradient_of_decode(real, method):
    synthetic = make_run(real, method, **EXACT.get(method, {})).synthetic.double()
    index = torch.tensor([1, synthetic.size - 1, 0])
    slope = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    parameters = [p for group in synthetic.param_groups() for p in group["params"]]
    expected = torch.autograd.grad((synthetic.decode(index)[0] * slope).sum(), parameters, allow_unused=True)
    for _ in range(2):
        synthetic.accumulate(index, slope)
    for p, want in zip(parameters, expected, strict=True):
        got = torch.zeros_like(p) if p.grad is None else p.grad
        torch.testing.assert_close(got, 2 * want if want is not None else torch.zeros_like(p), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("method", METHODS)
def test_gradients_reach_every_learned_tensor(real, method, objective):
    run = make_run(real, method, objective)
    numbers = run.objective.step(run.synthetic, 0)
    assert "loss" in numbers
    for group in [*run.synthetic.param_groups(), *run.objective.learned()]:
        assert sum(float(p.grad.abs().sum()) for p in group["params"]) > 0, group["name"]


@pytest.mark.parametrize("method", METHODS)
def test_every_tensor_of_a_group_is_learned(real, method):
    run = make_run(real, method)
    learned = {id(p) for group in run.synthetic.param_groups() for p in group["params"]}
    assert learned == {id(p) for p in run.synthetic.parameters()}


@pytest.mark.parametrize("method", METHODS)
def test_save_load_decode_is_bit_equal_and_counted(real, method, tmp_path):
    run = make_run(real, method)
    run.advance()
    run.synthetic.finalize()
    index = torch.arange(run.synthetic.size)
    before, labels = run.synthetic.decode(index)
    artifact.save(tmp_path / "a.safetensors", run.synthetic, run.header("as asked"))
    loaded = speedk.load(tmp_path / "a.safetensors")
    assert torch.equal(loaded.images(), before.detach()) and torch.equal(loaded.labels, labels)
    stored = sum(t.numel() * t.element_size() for name, t in run.synthetic.storage().items() if name != "labels")
    planned = run.synthetic.planned_storage(run.synthetic.spec, real.geometry, 4)
    assert stored == 4 * sum(planned.values()) <= 4 * real.geometry.budget(4)
    loaded.synthetic.finalize()
    assert torch.equal(loaded.images(), before.detach())


@pytest.mark.parametrize("method", METHODS)
def test_the_start_depends_on_the_generator_alone(real, method):
    torch.manual_seed(1)
    first = make_run(real, method).synthetic.state_dict()
    torch.manual_seed(2)
    again = make_run(real, method).synthetic.state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)


def gradients(real, objective, step):
    """Of the pixels, in one step of a run that went on from a checkpoint."""
    state = make_run(real, "pixels", objective).objective.state_dict()
    fresh = make_run(real, "pixels", objective)
    fresh.objective.load_state_dict(state)
    fresh.objective.step(fresh.synthetic, step)
    return fresh.synthetic.images.grad


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_step_depends_on_seed_and_number_alone(real, objective):
    torch.manual_seed(1)
    first = gradients(real, objective, 3)
    torch.manual_seed(2)
    assert torch.equal(first, gradients(real, objective, 3))


@pytest.mark.parametrize("objective", QUICK)
def test_each_step_draws_anew(real, objective):
    assert not torch.equal(gradients(real, objective, 3), gradients(real, objective, 4))


class Drawn(TorchDispatchMode):
    """Notes where random numbers go that a generator of the CPU draws."""

    def __init__(self):
        super().__init__()
        self.into = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(isinstance(value, torch.Generator) for value in (*args, *kwargs.values())) and args:
            self.into |= {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        return function(*args, **kwargs)


@pytest.mark.parametrize(("method", "fields"), [*((method, {}) for method in METHODS), ("speed", {"init": "random"}),
                                                ("pixels", {"init": "noise"})])
def test_what_may_live_on_a_gpu_is_not_drawn_into(real, method, fields):
    """All generators are of the CPU, and PyTorch lets none of them fill a tensor of another device."""
    run = make_run(real, method, **fields)
    with Drawn() as drawn:
        run.initialise(loop.Progress())
    kept = {t.untyped_storage().data_ptr() for t in (*run.synthetic.parameters(), *run.synthetic.buffers())}
    assert not drawn.into & kept
