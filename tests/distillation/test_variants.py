"""Ablations of SPEED: local sparsification, what blocks share, convolutions; each against its definition in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from toys import make_real

import speedk
from speedk import ops
from speedk.distillation import artifact, loop
from speedk.distillation.freenet import FReeNet
from speedk.distillation.parameterizations.speed import Speed
from speedk.distillation.recipe import read, resolve
from speedk.errors import ArtifactError, ConfigError
from speedk.geometry import Geometry

SIZES = {"method": "speed", "images_per_class": 3, "D": 8, "K": 8, "H": 2, "R": 2, "k": 16, "patch": 4, "fit_steps": 3}
VARIANTS = {
    "local": {"sparsify": "local", "k": 32}, "tokens shared": {"shared": "saet"}, "nothing shared": {"shared": "none"},
    "convolutions": {"convolutions": 2, "kernel": 5},
    "all": {"sparsify": "local", "shared": "none", "convolutions": 1, "norm": "sum"},
}


@pytest.fixture(scope="module")
def real():
    return make_real(resolution=16)


def make_run(real, **fields):
    tables = {"data": {"ipc": 4}, "parameterization": SIZES, "objective": {"dm": {"steps": 2, "batch": 2}}}
    run = loop.Run(resolve(tables, "dm", fields), real, torch.device("cpu"))
    run.initialise(loop.Progress())
    return run


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=list(VARIANTS))
def test_a_variant_learns_and_its_file_decodes_to_the_same_bits(real, fields, tmp_path):
    run = make_run(real, **fields)
    start = {name: p.detach().clone() for name, p in run.synthetic.named_parameters()}
    run.advance()
    assert not any(torch.equal(start[name], p) for name, p in run.synthetic.named_parameters())
    run.synthetic.finalize()
    before = run.synthetic.decode(torch.arange(9))[0].detach()
    artifact.save(tmp_path / "a.safetensors", run.synthetic, run.header("as asked"))
    loaded = speedk.load(tmp_path / "a.safetensors")
    assert torch.equal(loaded.images(), before) and bool(torch.isfinite(before).all())
    assert {name: loaded.header["spec"][name] for name in fields} == fields
    planned = Speed.planned_storage(run.synthetic.spec, real.geometry, 4)
    assert loaded.header["numbers"] == sum(planned.values())


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=list(VARIANTS))
def test_what_is_matched_is_what_is_stored(real, fields):
    synthetic = make_run(real, **fields).synthetic
    decoded = synthetic.decode(torch.arange(9))[0].detach()
    synthetic.finalize()
    torch.testing.assert_close(synthetic.decode(torch.arange(9))[0].detach(), decoded, rtol=1e-4, atol=1e-5)


def test_local_keeps_the_largest_of_each_patch(real):
    synthetic = make_run(real, sparsify="local", k=48).synthetic
    scm = torch.randn(3, 2, 16, 8)
    scm[0, 0, 0] = 1.0  # ties: the lowest index
    kept = synthetic.sparsify(scm, 48)
    for code, sparse in zip(scm.reshape(-1, 8), kept.reshape(-1, 8)):
        order = sorted(range(8), key=lambda i: (-abs(float(code[i])), i))[:3]
        assert sparse.nonzero()[:, 0].tolist() == sorted(order) and torch.equal(sparse[order], code[order])
    synthetic.scm.data[:3] = scm
    synthetic.finalize()
    values, rows, cols = synthetic.stored
    assert rows.dtype == cols.dtype == torch.uint8
    assert torch.equal(ops.coo_decode(values, rows, cols, 16, 8)[:3], kept)


def written_out(freenet, scm, saet):
    """Eq. 3 and 4 with codes and tokens of each block's own, a block at a time."""
    heads = scm.shape[1] // len(freenet.blocks)
    state = 0
    for r, block in enumerate(freenet.blocks):
        tokens = saet[r] if saet.ndim == 3 else saet
        parts = tokens.chunk(heads, dim=1)
        joined = torch.cat([scm[:, r * heads + h] @ parts[h] for h in range(heads)], dim=-1)
        inner = block.norm1(block.projection(joined)) + state
        state = block.norm2(block.fc2(F.gelu(block.fc1(inner))) + inner)
    patches = freenet.output(state)
    n, j, side = len(scm), round(freenet.patches**0.5), freenet.patch
    images = patches.reshape(n, j, j, side, side, freenet.channels).permute(0, 5, 1, 3, 2, 4)
    images = images.reshape(n, freenet.channels, j * side, j * side)
    for number, layer in enumerate(freenet.convolutions):
        padded = F.pad(F.gelu(images) if number else images, [layer.kernel_size[0] // 2] * 4)
        images = images + F.conv2d(padded, layer.weight, layer.bias)
    return images


@pytest.mark.parametrize(("shared", "saet"), [("saet", (6, 8)), ("none", (3, 6, 8))])
def test_each_block_has_its_own(shared, saet):
    torch.manual_seed(0)
    freenet = FReeNet(8, 3, 3, 2, 9, shared=shared, convolutions=2).double()
    for p in freenet.parameters():
        torch.nn.init.normal_(p, std=0.5)
    scm = torch.randn(4, 6, 9, 6, dtype=torch.float64, requires_grad=True)
    tokens = torch.randn(saet, dtype=torch.float64, requires_grad=True)
    got, want = freenet(scm, tokens), written_out(freenet, scm, tokens)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    slope = torch.randn_like(want)
    learned = [scm, tokens, *freenet.parameters()]
    for a, b in zip(torch.autograd.grad(got, learned, slope), torch.autograd.grad(want, learned, slope)):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)
    values, rows, cols = ops.coo_encode(scm, 54)
    torch.testing.assert_close(freenet.decode(values, rows, cols, tokens), want, rtol=1e-10, atol=1e-10)


def test_convolutions_start_as_none_and_by_default_there_is_none_of_it():
    torch.manual_seed(0)
    plain, wide = FReeNet(8, 2, 3, 4, 16), FReeNet(8, 2, 3, 4, 16, convolutions=2, kernel=5)
    generator = torch.Generator()
    for freenet in (plain, wide):
        freenet.reset(generator.manual_seed(1))
    scm, saet = torch.randn(2, 2, 16, 8), torch.randn(8, 8)
    assert torch.equal(plain(scm, saet), wide(scm, saet))
    assert torch.equal(plain(scm, saet), ops.freenet(scm, saet, plain.weights()))


def test_the_papers_counts():
    """Table III of the appendix: 549K, 543K and 305K numbers."""
    for shared, thousands in (("none", 549), ("saet", 543), ("both", 305)):
        recipe = resolve(read("cifar100-ipc1-speed"), "dm", {"shared": shared, "budget": "off"})
        assert round(recipe.budget(Geometry(100, 3, 32)).counted / 1000) == thousands
    recipe = resolve(read("imagenette-ipc1-speed"), "dm", {"convolutions": 2, "kernel": 5})
    plain = resolve(read("imagenette-ipc1-speed"), "dm")
    g = Geometry(10, 3, 128)
    assert recipe.budget(g).counted - plain.budget(g).counted == 2 * (3 * 3 * 25 + 3)
    assert math.isclose(recipe.budget(g).counted, 482_880 + 456)


@pytest.mark.parametrize(("fields", "message"), [
    ({"sparsify": "locally"}, "sparsify='locally' is not one of global, local"),
    ({"sparsify": "local", "k": 17}, "k=17 is not a multiple of J=16 patches"),
    ({"shared": "scm"}, "shared='scm' is not one of both, saet, none"),
    ({"convolutions": -1}, "convolutions=-1 is outside 0 to 8"),
    ({"convolutions": 9}, "convolutions=9 is outside"),
    ({"kernel": 4}, "kernel=4 is not an odd number"),
])
def test_what_is_refused(real, fields, message):
    with pytest.raises(ConfigError, match=message):
        make_run(real, **fields)


def test_a_local_file_with_other_rows_is_refused(real):
    synthetic = make_run(real, sparsify="local", k=16).synthetic
    synthetic.finalize()
    tensors = synthetic.storage()
    rows = tensors["scm.rows"].clone()
    rows[0, 0, 0], rows[0, 0, 1] = 0, 0  # patch 0 twice, patch 1 not at all
    tensors["scm.cols"][0, 0, :2] = torch.tensor([2, 5], dtype=torch.uint8)
    with pytest.raises(ArtifactError, match="a patch does not have the k / J = 1 entries"):
        Speed.from_storage(synthetic.spec, real.geometry, 4, [3, 3, 3], tensors | {"scm.rows": rows})


def test_the_papers_starting_values(real):
    """Tokens and codes from N(0, 0.2^2), Xavier-uniform matrices, no biases, norms that do nothing."""
    speed = make_run(real, D=64, K=64, H=4, budget="off", init="random").synthetic
    for drawn in (speed.saet.detach(), speed.scm.detach()):
        assert drawn.numel() > 4000 and abs(drawn.mean()) < 0.01 and abs(drawn.std() - 0.2) < 0.01
        assert 0.65 < (drawn.abs() < 0.2).double().mean() < 0.71  # as many as within one deviation of a normal
    for module in speed.freenet.modules():
        if isinstance(module, torch.nn.Linear):
            bound = math.sqrt(6 / (module.in_features + module.out_features))
            assert 0.98 * bound < module.weight.abs().max() <= bound and not module.bias.any()
            assert abs(module.weight.std() - bound / math.sqrt(3)) < 0.02 * bound
        elif isinstance(module, torch.nn.LayerNorm):
            assert (module.weight == 1).all() and not module.bias.any() and module.eps == 1e-6
