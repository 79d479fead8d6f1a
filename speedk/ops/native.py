"""Launchers of the C++/CUDA kernels: allocate, pass addresses, return. The ops have checked what comes in.

They are named and called like the Triton launchers of `speedk.kernels`, so that an op body is the same for both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from speedk.ops.dispatch import native

# The values of `Dtype` in csrc/isa.h.
DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}

# Where a product feeds a kernel, the tokens are made in pieces of about this many bytes, which stay in the caches.
PIECE_BYTES = 1 << 20


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def topk(scm: Tensor, k: int, *, dense: Tensor | None = None, mask: Tensor | None = None, values: Tensor | None = None,
         rows: Tensor | None = None, cols: Tensor | None = None) -> bool:
    """Fill whichever results are given, all contiguous, from scm [N, H, J, K]; returns whether scm holds a NaN."""
    scm = scm.contiguous()
    n, h, j, tokens = scm.shape
    index_bytes = 0 if rows is None else rows.element_size()
    return native().topk(
        DTYPES[scm.dtype], scm.data_ptr(), n * h, j, tokens, k, address(dense), address(mask), address(values),
        address(rows), address(cols), index_bytes, torch.get_num_threads(),
    )  # fmt: skip


def _entries(values: Tensor, rows: Tensor, cols: Tensor, J: int, K: int):
    n, h, k = values.shape
    return native().Entries(DTYPES[values.dtype], values.data_ptr(), rows.data_ptr(), cols.data_ptr(),
                            rows.element_size(), n * h, k, J, K)  # fmt: skip


def coo_decode_fwd(values: Tensor, rows: Tensor, cols: Tensor, J: int, K: int) -> tuple[Tensor, bool]:
    """The dense matrices [N, H, J, K], and whether an index was out of range (its entry is left out)."""
    values, rows, cols = values.contiguous(), rows.contiguous(), cols.contiguous()
    dense = values.new_empty(*values.shape[:2], J, K)
    bad = native().coo_decode(_entries(values, rows, cols, J, K), dense.data_ptr(), torch.get_num_threads())
    return dense, bad


def coo_decode_bwd(d_dense: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """d_values [N, H, k]; zero where an index is out of range."""
    d_dense, rows, cols = d_dense.contiguous(), rows.contiguous(), cols.contiguous()
    d_values = d_dense.new_empty(rows.shape)
    entries = _entries(d_values, rows, cols, *d_dense.shape[2:])
    native().coo_decode_backward(entries, d_dense.data_ptr(), d_values.data_ptr(), torch.get_num_threads())
    return d_values


def mhsc_coo_fwd(values: Tensor, rows: Tensor, cols: Tensor, saet: Tensor, J: int) -> tuple[Tensor, bool]:
    """The features [N, J, D], and whether an index was out of range (its entry is left out)."""
    values, rows, cols, saet = values.contiguous(), rows.contiguous(), cols.contiguous(), saet.contiguous()
    features = values.new_empty(values.shape[0], J, saet.shape[1])
    entries = _entries(values, rows, cols, J, saet.shape[0])
    bad = native().mhsc_coo(entries, saet.data_ptr(), values.shape[1], saet.shape[1], features.data_ptr(),
                            torch.get_num_threads())  # fmt: skip
    return features, bad


def mhsc_coo_bwd(d_out: Tensor, values: Tensor, rows: Tensor, cols: Tensor, saet: Tensor, need_values: bool = True,
                 need_saet: bool = True) -> tuple[Tensor | None, Tensor | None]:
    """d_values [N, H, k] and d_saet [K, D], None where not needed."""
    d_out, values, saet = d_out.contiguous(), values.contiguous(), saet.contiguous()
    rows, cols = rows.contiguous(), cols.contiguous()
    d_values = torch.empty_like(values) if need_values else None
    d_saet = torch.empty_like(saet) if need_saet else None
    partial = saet.new_empty(native().parts, *saet.shape) if need_saet else None
    entries = _entries(values, rows, cols, d_out.shape[1], saet.shape[0])
    native().mhsc_coo_backward(entries, saet.data_ptr(), d_out.data_ptr(), values.shape[1], saet.shape[1],
                               address(d_values), address(d_saet), address(partial), torch.get_num_threads())
    return d_values, d_saet


def patchify_fwd(images: Tensor, patch: int) -> Tensor:
    """images [N, C, H, W] -> tokens [N, J, L]."""
    images = images.contiguous()
    n, c, height, width = images.shape
    rows, columns = height // patch, width // patch
    tokens = images.new_empty(n, rows * columns, patch * patch * c)
    shape = native().Patches(images.element_size(), n, c, rows, columns, patch)
    native().patchify(shape, images.data_ptr(), tokens.data_ptr(), torch.get_num_threads())
    return tokens


def unpatchify_fwd(tokens: Tensor, channels: int, patch: int, width: int, out: Tensor | None = None) -> Tensor:
    """tokens [N, J, L], `width` patches in a row -> images [N, C, H, W]; into `out`, contiguous, where given."""
    tokens = tokens.contiguous()
    n, j, _ = tokens.shape
    rows = j // width if width else 0
    out = tokens.new_empty(n, channels, rows * patch, width * patch) if out is None else out
    shape = native().Patches(tokens.element_size(), n, channels, rows, width, patch)
    native().unpatchify(shape, tokens.data_ptr(), out.data_ptr(), torch.get_num_threads())
    return out


def tokens_to_images_fwd(state: Tensor, weight: Tensor, bias: Tensor, channels: int, patch: int) -> Tensor:
    """unpatchify(state @ weight.T + bias), piece by piece."""
    n, j, _ = state.shape
    side = round(j**0.5)
    images = state.new_empty(n, channels, side * patch, side * patch)
    step = _images_in_a_piece(j * weight.shape[0] * state.element_size(), n)
    tokens = state.new_empty(step * j, weight.shape[0])
    for start in range(0, n, step):
        piece = state[start:start + step]
        rows = tokens[:len(piece) * j]
        torch.addmm(bias, piece.reshape(-1, piece.shape[-1]), weight.T, out=rows)
        unpatchify_fwd(rows.view(len(piece), j, -1), channels, patch, side, out=images[start:start + step])
    return images


def tokens_to_images_bwd(d_images: Tensor, state: Tensor, weight: Tensor, patch: int) -> tuple[Tensor, Tensor, Tensor]:
    """d_state [N, J, D], d_weight [L, D] and d_bias [L], piece by piece."""
    n, j, d = state.shape
    d_state = state.new_empty(n, j, d)
    d_weight, d_bias = torch.zeros_like(weight), weight.new_zeros(weight.shape[0])
    step = _images_in_a_piece(j * weight.shape[0] * state.element_size(), n)
    for start in range(0, n, step):
        d_tokens = patchify_fwd(d_images[start:start + step], patch).flatten(0, 1)
        torch.mm(d_tokens, weight, out=d_state[start:start + step].view(-1, d))
        d_weight.addmm_(d_tokens.T, state[start:start + step].reshape(-1, d))
        d_bias += d_tokens.sum(0)
    return d_state, d_weight, d_bias


def _images_in_a_piece(bytes_of_one: int, images: int) -> int:
    return max(1, min(PIECE_BYTES // max(bytes_of_one, 1), images))


def _norm_act_pool(x: Tensor, weight: Tensor, bias: Tensor, eps: float):
    return native().NormActPool(DTYPES[x.dtype], x.data_ptr(), weight.data_ptr(), bias.data_ptr(), *x.shape, eps)


def norm_act_pool_fwd(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The pooled activations [B, C, H // 2, W // 2], and the mean and inverse deviation [B, C] of each plane."""
    x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
    b, c, h, w = x.shape
    out, mean, rstd = x.new_empty(b, c, h // 2, w // 2), x.new_empty(b, c), x.new_empty(b, c)
    native().norm_act_pool(_norm_act_pool(x, weight, bias, eps), out.data_ptr(), mean.data_ptr(), rstd.data_ptr(),
                           torch.get_num_threads())
    return out, mean, rstd


def norm_act_pool_bwd(d_out: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor,
                      eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """d_x [B, C, H, W], d_weight and d_bias [C]."""
    d_out, x, weight, bias = d_out.contiguous(), x.contiguous(), weight.contiguous(), bias.contiguous()
    d_x, d_weight, d_bias = x.new_empty(x.shape), mean.new_empty(mean.shape), mean.new_empty(mean.shape)
    native().norm_act_pool_backward(
        _norm_act_pool(x, weight, bias, eps), d_out.data_ptr(), mean.data_ptr(), rstd.data_ptr(), d_x.data_ptr(),
        d_weight.data_ptr(), d_bias.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return d_x, d_weight.sum(0), d_bias.sum(0)
