"""No Triton kernel reads or writes outside the tensors it is given. The interpreter by itself does not look."""

from __future__ import annotations

import pytest
import torch
from test_freenet_triton import block_weights
from triton_support import DEVICE, randn

if DEVICE != "cpu":
    pytest.skip("needs Triton's interpreter, which runs where there is no GPU", allow_module_level=True)

import triton
import triton.language as tl
from triton.runtime import interpreter

from speedk.kernels import add_layer_norm, coo, freenet, mhsc, patches

SIZES = [  # N, H, J, K, k, D, C, patch: no blocks are full, then all are
    (3, 2, 9, 21, 5, 34, 3, 3),
    (2, 3, 16, 37, 9, 51, 1, 5),
    (1, 2, 64, 64, 16, 32, 3, 4),
    (1, 1, 1, 1, 1, 1, 1, 1),
]


@pytest.fixture(autouse=True)
def checked(monkeypatch):
    """Look at each address; gives the list of the launches, by the storages they may touch."""
    launches: list[list[tuple[int, int]]] = []
    arguments = interpreter.GridExecutor._init_args_hst

    def note(self, *given):
        args, kwargs = arguments(self, *given)
        storages = [t.untyped_storage() for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
        launches.append([(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages])
        return args, kwargs

    def look_at(name: str) -> None:
        access = getattr(interpreter.InterpreterBuilder, name)

        def look(self, pointers, *rest):
            mask = rest[0 if "load" in name else 1]
            first = pointers.data[mask.data.astype(bool)].astype("int64")
            behind = first + max(1, pointers.get_element_ty().primitive_bitwidth // 8)
            inside = sum((first >= begin) & (behind <= end) for begin, end in launches[-1])
            assert first.size == 0 or inside.all(), f"{name}: {(~(inside > 0)).sum()} addresses outside"
            return access(self, pointers, *rest)

        monkeypatch.setattr(interpreter.InterpreterBuilder, name, look)

    monkeypatch.setattr(interpreter.GridExecutor, "_init_args_hst", note)
    look_at("create_masked_load")
    look_at("create_masked_store")
    return launches


@triton.jit
def _copy_kernel(source_ptr, target_ptr, size, B: tl.constexpr):
    at = tl.arange(0, B)
    tl.store(target_ptr + at, tl.load(source_ptr + at, at < size, 0.0), at < B)


def test_an_address_outside_is_told():
    ample, short = torch.zeros(16), torch.zeros(15)
    _copy_kernel[(1,)](short, ample, 15, B=16)
    for source, target, size, said in ((short, ample, 16, "load: 1 "), (ample, short, 16, "store: 1 ")):
        with pytest.raises(interpreter.InterpreterError, match=said):
            _copy_kernel[(1,)](source, target, size, B=16)


@pytest.mark.parametrize(("sizes", "dtype"), [*((s, torch.float32) for s in SIZES), (SIZES[0], torch.bfloat16)],
                         ids=str)
def test_dense(sizes, dtype, checked):
    N, H, J, K, _, D, C, patch = sizes
    scm, saet, state = randn(N, H, J, K, dtype=dtype), randn(K, D, dtype=dtype), randn(N, J, D, dtype=dtype)
    mhsc.mhsc_fwd(scm, saet)
    mhsc.mhsc_bwd(state, scm, saet)
    add_layer_norm.add_layer_norm_fwd(state, state, saet[0], saet[0], 1e-6)
    add_layer_norm.add_layer_norm_bwd(state, state, state, saet[0], 1e-6)
    weight = randn(patch * patch * C, D, dtype=dtype)
    images = patches.tokens_to_images_fwd(state, weight, weight[:, 0], C, patch)
    patches.tokens_to_images_bwd(images, state, weight, patch)
    patches.unpatchify_fwd(patches.patchify_fwd(images, patch), C, patch)
    assert len(checked) >= 10


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_stored(sizes, checked):
    N, H, J, K, k, D, *_ = sizes
    values, saet, index = randn(N, H, k), randn(K, D), torch.arange(k).expand(N, H, k)
    rows, cols = (index % J).to(torch.uint8), (index % K).to(torch.uint8)
    dense, _ = coo.coo_decode_fwd(values, rows, cols, J, K)
    coo.coo_decode_bwd(dense, rows, cols)
    out, _ = coo.mhsc_coo_fwd(values, rows, cols, saet, J)
    coo.mhsc_coo_bwd(out, values, rows, cols, saet)
    assert len(checked) >= 4


BLOCKS = [  # norm, D, dtype: each way to take a block; a wide one of whole tiles, and not
    *(("branch", D, torch.float32) for D in (20, 48, 70, 192)),
    *((norm, 136, torch.float32) for norm in ("first", "branch", "sum")),
    ("sum", 70, torch.float16),
    ("sum", 192, torch.float16),
]


@pytest.mark.parametrize(("norm", "D", "dtype"), BLOCKS, ids=str)
def test_block(norm, D, dtype, checked, monkeypatch):
    for most in ("CHUNK", "WIDE_CHUNK", "WIDE_FORWARD"):
        monkeypatch.setattr(freenet, most, 40)
    monkeypatch.setattr(freenet, "LEAST", 1)
    features, weights = randn(3, 23, D, dtype=dtype), tuple(block_weights(D, dtype))
    state = None if norm == "first" else features
    norm = norm.replace("first", "branch")
    out = freenet.freenet_block_fwd(features, state, weights, norm, 1e-6)
    freenet.freenet_block_bwd(out, features, state, weights, norm, 1e-6)
    assert len(checked) >= 4
