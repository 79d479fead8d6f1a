"""Affine maps of images, sampled bilinearly."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from speedk.ordered import add_rows


def affine(images: Tensor, matrix: Tensor) -> Tensor:
    """Sample each image bilinearly at matrix (x, y), where x and y go from -1 to 1 between the centres of the outermost
    pixels; zeros outside.

    images: [B, C, H, W] float; matrix: [B, 2, 2], or [1, 2, 2] for all alike, float32 or wider, on the same device.
    Differentiable in the images once; on a GPU any number of times.
    """
    if images.is_cuda:  # where the gradient of grid_sample adds in any order
        return _Sample.apply(images, matrix, False)
    grid = F.affine_grid(F.pad(matrix, (0, 1)).to(images), [len(matrix), *images.shape[1:]], align_corners=True)
    return F.grid_sample(images, grid.expand(len(images), -1, -1, -1), mode="bilinear", padding_mode="zeros",
                         align_corners=True)


class _Sample(torch.autograd.Function):
    """What grid_sample gives, or its adjoint, which adds in a fixed order. Each is the other's derivative."""

    @staticmethod
    def forward(ctx, images: Tensor, matrix: Tensor, adjoint: bool) -> Tensor:
        ctx.save_for_backward(matrix)
        ctx.adjoint = adjoint
        b, c, h, w = images.shape
        rows = images.permute(0, 2, 3, 1).reshape(-1, c).to(matrix.dtype)  # [B H W, C]
        at, share = _neighbours(matrix, b, h, w)
        if adjoint:
            out = torch.zeros_like(rows)
            add_rows(out, at.flatten(), (share[:, :, None] * rows).flatten(0, 1))
        else:
            out = sum(part[:, None] * rows[index] for index, part in zip(at, share))
        # Not `contiguous`, which leaves one channel with the strides of channels last: a convolution would take these
        # batches another way than all others.
        return out.view(b, h, w, c).permute(0, 3, 1, 2).clone(memory_format=torch.contiguous_format).to(images.dtype)

    @staticmethod
    def backward(ctx, d_out: Tensor):
        return _Sample.apply(d_out, *ctx.saved_tensors, not ctx.adjoint), None, None


def _neighbours(matrix: Tensor, b: int, h: int, w: int) -> tuple[Tensor, Tensor]:
    """The four pixels around each sampled place, as rows of [B H W], and their shares: [4, B H W] each.

    A neighbour outside has share 0 and stands for the pixel at the border that is nearest to it: if all stood for one,
    the adjoint would add them to that, one after another.
    """
    y, x = ((torch.arange(n, dtype=matrix.dtype, device=matrix.device) * 2 - (n - 1)) / max(n - 1, 1) for n in (h, w))
    (xx, xy), (yx, yy) = matrix[..., None, None].permute(1, 2, 0, 3, 4)  # [B or 1, 1, 1] each
    right, down = ((a * x + d * y[:, None] + 1) * ((n - 1) / 2) for a, d, n in ((xx, xy, w), (yx, yy, h)))
    left, top = right.floor(), down.floor()
    first = torch.arange(b, device=matrix.device)[:, None, None] * (h * w)
    at, shares = [], []
    for i, of_row in ((top, top + 1 - down), (top + 1, down - top)):
        for j, of_column in ((left, left + 1 - right), (left + 1, right - left)):
            inside = (i >= 0) & (i < h) & (j >= 0) & (j < w)
            at.append(first + (i.clamp(0, h - 1) * w + j.clamp(0, w - 1)).long())
            shares.append((of_row * of_column * inside).expand(b, h, w))
    return torch.stack(at).flatten(1), torch.stack(shares).flatten(1)
