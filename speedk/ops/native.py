"""Launchers of the C++/CUDA kernels: allocate, pass addresses, return. The ops have checked what comes in.

They are named and called like the Triton launchers of `speedk.kernels`, so that an op body is the same for both.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor

from speedk.ops.dispatch import native

# The values of `Dtype` in csrc/isa.h.
DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
WIDE = (torch.float32, torch.float64)


def takes(tensor: Tensor, dtypes: Collection[torch.dtype], cuda: bool = False) -> None:
    """Raise ValueError where an op that was called by its registered name is not made for this tensor."""
    if tensor.dtype not in dtypes or not (tensor.device.type == "cpu" or (cuda and tensor.is_cuda)):
        raise ValueError(f"the native kernel does not take {tensor.dtype} on {tensor.device}")


@torch.compiler.assume_constant_result
def gpu_lacks(device: int | None, needed: int) -> str | None:
    """What this GPU has not that a kernel needs whose programs take `needed` bytes of shared memory; or None."""
    has = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    return None if needed <= has else f"it needs {needed:,} bytes of shared memory, this GPU has {has:,}"


def ready(tensor: Tensor) -> Tensor:
    """`tensor` in memory order, at an address that is a multiple of 16."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def topk(scm: Tensor, k: int, *, dense: Tensor | None = None, mask: Tensor | None = None, values: Tensor | None = None,
         rows: Tensor | None = None, cols: Tensor | None = None, check: bool = True) -> bool | Tensor | None:
    """Fill whichever results are given, all contiguous, from scm [N, H, J, K]; returns whether scm holds a NaN (on a
    GPU as a flag there, int32 [1]: asking for its truth waits; None without `check`, as a flag costs a launch)."""
    takes(scm, DTYPES, cuda=True)
    scm = scm.contiguous()
    n, h, j, tokens = scm.shape
    index_bytes = 0 if rows is None else rows.element_size()
    job = native().Topk(
        DTYPES[scm.dtype], scm.data_ptr(), n * h, j, tokens, k, address(dense), address(mask), address(values),
        address(rows), address(cols), index_bytes, torch.get_num_threads(),
    )  # fmt: skip
    if not scm.is_cuda:
        return native().topk(job)
    flag = torch.zeros(1, dtype=torch.int32, device=scm.device) if check else None
    with torch.cuda.device(scm.device):
        code = native().topk_cuda(job, address(flag), torch.cuda.current_stream().cuda_stream)
    if code:
        raise RuntimeError(f"the topk kernel could not be launched: CUDA error {code}")
    return flag


def _mhsc(scm: Tensor, saet: Tensor):
    takes(scm, WIDE)
    n, h, j, k = scm.shape
    return native().Mhsc(DTYPES[scm.dtype], n, h, j, k, saet.shape[1], scm.data_ptr(), saet.data_ptr(),
                         torch.get_num_threads())  # fmt: skip


def mhsc_fwd(scm: Tensor, saet: Tensor) -> Tensor:
    """The features [N, J, D]."""
    scm, saet = scm.contiguous(), saet.contiguous()
    features = scm.new_empty(scm.shape[0], scm.shape[2], saet.shape[1])
    native().mhsc(_mhsc(scm, saet), features.data_ptr())
    return features


def mhsc_bwd(d_out: Tensor, scm: Tensor, saet: Tensor, need_scm: bool = True,
             need_saet: bool = True) -> tuple[Tensor | None, Tensor | None]:
    """d_scm [N, H, J, K] and d_saet [K, D], None where not needed."""
    d_out, scm, saet = d_out.contiguous(), scm.contiguous(), saet.contiguous()
    d_scm = torch.empty_like(scm) if need_scm else None
    d_saet = torch.empty_like(saet) if need_saet else None
    partial = saet.new_empty(native().mhsc_parts, *saet.shape) if need_saet else None
    native().mhsc_backward(_mhsc(scm, saet), d_out.data_ptr(), address(d_scm), address(d_saet), address(partial))
    return d_scm, d_saet


def _entries(values: Tensor, rows: Tensor, cols: Tensor, J: int, K: int):
    takes(values, WIDE)
    takes(rows, (torch.uint8, torch.uint16))
    takes(cols, (rows.dtype,))
    n, h, k = values.shape
    return native().Entries(DTYPES[values.dtype], values.data_ptr(), rows.data_ptr(), cols.data_ptr(),
                            rows.element_size(), n * h, k, J, K)  # fmt: skip


def coo_decode_fwd(values: Tensor, rows: Tensor, cols: Tensor, J: int, K: int,
                   check: bool = True) -> tuple[Tensor, bool]:
    """The dense matrices [N, H, J, K], and whether an index was out of range (its entry is left out), which costs
    nothing to say here."""
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


def mhsc_coo_fwd(values: Tensor, rows: Tensor, cols: Tensor, saet: Tensor, J: int,
                 check: bool = True) -> tuple[Tensor, bool]:
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
    takes(images, DTYPES)
    images = images.contiguous()
    n, c, height, width = images.shape
    rows, columns = height // patch, width // patch
    tokens = images.new_empty(n, rows * columns, patch * patch * c)
    shape = native().Patches(images.element_size(), n, c, rows, columns, patch)
    native().patchify(shape, images.data_ptr(), tokens.data_ptr(), torch.get_num_threads())
    return tokens


def unpatchify_fwd(tokens: Tensor, channels: int, patch: int, width: int, out: Tensor | None = None) -> Tensor:
    """tokens [N, J, L], `width` patches in a row -> images [N, C, H, W]; into `out`, contiguous, where given."""
    takes(tokens, DTYPES)
    tokens = tokens.contiguous()
    n, j, _ = tokens.shape
    rows = j // width if width else 0
    out = tokens.new_empty(n, channels, rows * patch, width * patch) if out is None else out
    shape = native().Patches(tokens.element_size(), n, channels, rows, width, patch)
    native().unpatchify(shape, tokens.data_ptr(), out.data_ptr(), torch.get_num_threads())
    return out


@torch.compiler.assume_constant_result
def matrix_unit() -> bool:
    """Whether the kernels take float32 products to a matrix unit (AMX) of this processor."""
    return native().matrix_unit()


def decode_fwd(inputs: Tensor, saet: Tensor | None, weights: list[Tensor], channels: int, patch: int,
               sum_norm: bool, keep: bool) -> tuple[Tensor, Tensor]:
    """Images [N, C, H, W] from codes [N, H, J, K] and SAETs [K, D], or from features [N, J, D] and None; and what
    `decode_bwd` need not find once more, if `keep` (else empty).

    `weights` are ten of each block, then the final two.
    """
    inputs, weights = inputs.contiguous(), [w.contiguous() for w in weights]
    saet = None if saet is None else saet.contiguous()
    side = _side(inputs.shape[-2]) * patch
    images = inputs.new_empty(inputs.shape[0], channels, side, side)
    net = _net(inputs, saet, weights, channels, patch, sum_norm)
    kept = inputs.new_empty(net.kept if keep else 0)
    native().decode(net, images.data_ptr(), kept.data_ptr())
    return images, kept


def decode_bwd(d_images: Tensor, kept: Tensor, inputs: Tensor, saet: Tensor | None, weights: list[Tensor],
               channels: int, patch: int, sum_norm: bool, need_inputs: bool = True,
               need_saet: bool = True) -> tuple[Tensor | None, list[Tensor]]:
    """The gradient of `inputs`, None where not needed, and those of all weights and, where there are any, of the SAETs;
    the last is zeros where not needed.

    Each has memory of its own: a view would keep the others alive, in memory and in a file that it is saved to."""
    d_images, kept, inputs = d_images.contiguous(), kept.contiguous(), inputs.contiguous()
    weights = [w.contiguous() for w in weights]
    saet = None if saet is None else saet.contiguous()
    net = _net(inputs, saet, weights, channels, patch, sum_norm)
    d_inputs = torch.empty_like(inputs) if need_inputs else None
    d_weights = [torch.empty_like(t) for t in (weights if saet is None else [*weights, saet])]
    partial = inputs.new_empty(net.partial)
    native().decode_backward(net, d_images.data_ptr(), kept.data_ptr(), address(d_inputs),
                             need_saet and saet is not None, [t.data_ptr() for t in d_weights], partial.data_ptr())
    return d_inputs, d_weights


def _net(inputs: Tensor, saet: Tensor | None, weights: list[Tensor], channels: int, patch: int, sum_norm: bool):
    takes(inputs, (torch.float32,))
    if saet is None:
        n, j, d = inputs.shape
        source = inputs.data_ptr(), 0, 0, 0, 0
    else:
        n, h, j, k = inputs.shape
        d = saet.shape[1]
        source = 0, h, k, inputs.data_ptr(), saet.data_ptr()
    return native().Net(n, j, d, len(weights) // 10, channels, patch, _side(j), sum_norm, *source,
                        [w.data_ptr() for w in weights], torch.get_num_threads())  # fmt: skip


def _side(patches: int) -> int:
    return math.isqrt(patches)  # the extension refuses what is no square


def tokens_to_images_fwd(state: Tensor, weight: Tensor, bias: Tensor, channels: int, patch: int) -> Tensor:
    """unpatchify(state @ weight.T + bias): a decoder without blocks."""
    return decode_fwd(state, None, [weight, bias], channels, patch, False, False)[0]


def tokens_to_images_bwd(d_images: Tensor, state: Tensor, weight: Tensor, patch: int, need_state: bool = True,
                         need_weight: bool = True) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """d_state [N, J, D], d_weight [L, D] and d_bias [L], None where not needed (the last two together): one pass over
    the tokens finds them all."""
    bias = weight.new_empty(weight.shape[0])  # of no consequence to the gradients
    nothing, channels = state.new_empty(0), d_images.shape[1]
    d_state, d_weights = decode_bwd(d_images, nothing, state, None, [weight, bias], channels, patch, False, need_state)
    return d_state, *(d_weights if need_weight else (None, None))


def _norm_act_pool(x: Tensor, weight: Tensor, bias: Tensor, eps: float, like: torch.memory_format):
    takes(x, DTYPES if x.is_cuda else WIDE, cuda=True)
    return native().NormActPool(DTYPES[x.dtype], like == torch.channels_last, x.data_ptr(), weight.data_ptr(),
                                bias.data_ptr(), *x.shape, eps)  # fmt: skip


def norm_act_pool_fwd(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The pooled activations [B, C, H // 2, W // 2], and the mean and inverse deviation [B, C] of each plane.

    What has x's size or the pooled one is laid out as x is: channels last, or else contiguous.
    """
    like = memory_format(x)
    x, weight, bias = x.contiguous(memory_format=like), weight.contiguous(), bias.contiguous()
    b, c, h, w = x.shape
    out = torch.empty(b, c, h // 2, w // 2, dtype=x.dtype, device=x.device, memory_format=like)
    mean, rstd = (x.new_empty(b, c, dtype=computed_in(x.dtype)) for _ in range(2))
    launch("norm_act_pool", _norm_act_pool(x, weight, bias, eps, like), out, mean, rstd)
    return out, mean, rstd


def norm_act_pool_bwd(d_out: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor,
                      eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """d_x [B, C, H, W], d_weight and d_bias [C]."""
    like = memory_format(x)
    d_out, x = d_out.contiguous(memory_format=like), x.contiguous(memory_format=like)
    weight, bias = weight.contiguous(), bias.contiguous()
    d_x, d_weight, d_bias = torch.empty_like(x), torch.empty_like(mean), torch.empty_like(mean)
    launch("norm_act_pool_backward", _norm_act_pool(x, weight, bias, eps, like), d_out, mean, rstd, d_x, d_weight,
            d_bias)
    return d_x, d_weight.sum(0).to(weight.dtype), d_bias.sum(0).to(bias.dtype)


def norm_act_pool_bwd_bwd(dd_x: Tensor, dd_weight: Tensor, dd_bias: Tensor, d_out: Tensor, x: Tensor, weight: Tensor,
                          bias: Tensor, mean: Tensor, rstd: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The adjoint of `norm_act_pool_bwd`: d_d_out [B, C, H // 2, W // 2], d_x [B, C, H, W] and d_weight [C], from the
    slopes of its results."""
    like = memory_format(x)
    dd_x, d_out, x = (t.contiguous(memory_format=like) for t in (dd_x, d_out, x))
    dd_weight, dd_bias, weight, bias = (t.contiguous() for t in (dd_weight, dd_bias, weight, bias))
    d_d_out, d_x, d_weight = torch.empty_like(d_out), torch.empty_like(x), torch.empty_like(mean)
    launch("norm_act_pool_double_backward", _norm_act_pool(x, weight, bias, eps, like), d_out, mean, rstd, dd_x,
            dd_weight, dd_bias, d_d_out, d_x, d_weight)
    return d_d_out, d_x, d_weight.sum(0).to(weight.dtype)


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """The type that a kernel computes in, given numbers of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def memory_format(x: Tensor) -> torch.memory_format:
    """channels_last where x [B, C, H, W] lies so in memory, contiguous_format where it lies otherwise."""
    last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def _unroll_step(lr: Tensor, like: Tensor, momentum: float):
    takes(like, WIDE, cuda=True)
    return native().UnrollStep(DTYPES[like.dtype], like.numel(), lr.data_ptr(), momentum)


def launch(name: str, job: object, *tensors: Tensor | None, numbers: tuple[int, ...] = ()) -> None:
    """Run the kernel `name`, or `name`_cuda where the first tensor is on a GPU."""
    given = [*(address(tensor) for tensor in tensors), *numbers]
    if not tensors[0].is_cuda:
        getattr(native(), name)(job, *given, torch.get_num_threads())
        return
    with torch.cuda.device(tensors[0].device):
        code = getattr(native(), f"{name}_cuda")(job, *given, torch.cuda.current_stream().cuda_stream)
    if code:
        raise RuntimeError(f"the {name} kernel could not be launched: CUDA error {code}")


def unroll_step_fwd(theta: Tensor, m: Tensor, gradient: Tensor, lr: Tensor, momentum: float) -> tuple[Tensor, Tensor]:
    """theta and m [P] after the step."""
    theta, m, gradient = theta.contiguous(), m.contiguous(), gradient.contiguous()
    after = torch.empty_like(theta), torch.empty_like(m)
    launch("unroll_step", _unroll_step(lr, theta, momentum), theta, m, gradient, *after)
    return after


def unroll_step_bwd(d_theta: Tensor, d_m: Tensor, m: Tensor | None, lr: Tensor,
                    momentum: float) -> tuple[Tensor, Tensor, Tensor]:
    """d_gradient and d_m [P] before the step, and d_lr [], zero where m is None."""
    d_theta, d_m, m = d_theta.contiguous(), d_m.contiguous(), None if m is None else m.contiguous()
    d_gradient, d_before, d_lr = torch.empty_like(d_theta), torch.empty_like(d_m), torch.zeros_like(lr)
    partial = torch.empty(native().step_chunks(d_theta.numel()), dtype=torch.float64, device=d_theta.device)
    job = _unroll_step(lr, d_theta, momentum)
    launch("unroll_step_adjoint", job, d_theta, d_m, m, d_gradient, d_before, d_lr, partial)
    return d_gradient, d_before, d_lr
