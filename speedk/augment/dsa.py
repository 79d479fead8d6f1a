"""Differentiable siamese augmentation (DSA): one operation a batch, replayable on any batch and any device.

`draw` decides on the CPU what happens, `apply` does it. The same `Draw` applied to two batches treats them alike, and
`apply` is differentiable in the images as often as they ask for (`scale` and `rotate` on the CPU: once, as torch's
grid_sample), and on every device its gradients add in a fixed order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from speedk.augment._affine import affine
from speedk.errors import ConfigError
from speedk.geometry import Geometry
from speedk.registry import nearest

BRIGHTNESS = 1.0  # an offset U(-0.5, 0.5) * BRIGHTNESS, in units of the normalised images
SATURATION = 2.0  # the distance from each pixel's mean over the channels is multiplied by U(0, SATURATION)
CONTRAST = 0.5  # the distance from the image's mean is multiplied by U(CONTRAST, 1 + CONTRAST)
CROP = 0.125  # a shift by whole pixels, up to this part of the side, per axis
CUTOUT = 0.5  # the side of the square that is set to zero, as a part of the image's
FLIP = 0.5  # the probability of a left-right flip
SCALE = 1.2  # per axis U(1 / SCALE, SCALE)
ROTATE = 15.0  # U(-ROTATE, ROTATE), in degrees


@dataclass(frozen=True)
class Draw:
    """What happens to one batch: the operation `op` and its parameters, CPU tensors [count] (or [1]: all alike).

    `side` is the resolution that the parameters were drawn for.
    """

    op: str
    side: int
    parameters: Mapping[str, Tensor]

    def select(self, index: Tensor | slice) -> Draw:
        """The draw of part of the batch: of `index`, int64 [B] or a slice. One draw for all stays as it is."""
        if isinstance(index, Tensor):
            index = index.cpu()
        parts = {name: p if len(p) == 1 else p[index] for name, p in self.parameters.items()}
        return Draw(self.op, self.side, parts)


def draw(count: int, size: int | Geometry, generator: torch.Generator, shared: bool = False,
         ops: Sequence[str] | None = None) -> Draw:
    """Draw one of `ops` (default: all six), uniformly, and its parameters for `count` images of `size` pixels a side.

    generator: on the CPU; the same state gives the same draw. shared: one set of parameters for the whole batch, as in
    siamese use, where the same draw is applied to a real and to a synthetic batch of another size.
    Raises ConfigError for an unknown operation.
    """
    side = size.resolution if isinstance(size, Geometry) else size
    ops = ALL if ops is None else ops
    for op in ops:
        if op not in ALL:
            raise ConfigError(f"{op!r} is not an augmentation, only {', '.join(ALL)}{nearest(op, list(ALL))}")
    if not ops:
        raise ConfigError("there is no augmentation to draw from; to augment nothing, do not call draw")
    op = ops[int(torch.randint(len(ops), (), generator=generator))]
    return Draw(op, side, _OPERATIONS[op][0](1 if shared else count, side, generator))


def apply(images: Tensor, drawn: Draw) -> Tensor:
    """The images [B, C, H, W], normalised, of any float dtype, augmented as `drawn` says; what is uncovered is zero.

    Raises ValueError where the draw is for another number or size of images.
    """
    side = drawn.side
    if images.dim() != 4 or tuple(images.shape[2:]) != (side, side):
        raise ValueError(f"images have shape {tuple(images.shape)} but the draw is for [B, C, {side}, {side}]")
    for p in drawn.parameters.values():
        if len(p) not in (1, len(images)):
            raise ValueError(f"there are {len(images)} images but the draw is for {len(p)}; use Draw.select")
    return _OPERATIONS[drawn.op][1](images, **drawn.parameters)


def _uniform(count: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(count, generator=generator)


def _integers(count: int, low: int, high: int, generator: torch.Generator) -> Tensor:
    """Uniform in low, ..., high, both included."""
    return torch.randint(low, high + 1, (count,), generator=generator)


def _rounded(part: float, side: int) -> int:
    return int(part * side + 0.5)


def _beside(drawn: Tensor, images: Tensor) -> Tensor:
    """`drawn` where the images are: on a GPU without waiting for what it is at."""
    return drawn.to(images.device, non_blocking=True)


def _per_image(p: Tensor, images: Tensor) -> Tensor:
    """A parameter [B] or [1] as [B, 1, 1, 1], of the images' dtype and device."""
    return _beside(p, images).to(images.dtype)[:, None, None, None]


def _draw_color(count: int, side: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {"brightness": _uniform(count, -BRIGHTNESS / 2, BRIGHTNESS / 2, generator),
            "saturation": _uniform(count, 0, SATURATION, generator),
            "contrast": _uniform(count, CONTRAST, 1 + CONTRAST, generator)}


def _color(images: Tensor, brightness: Tensor, saturation: Tensor, contrast: Tensor) -> Tensor:
    """Brightness x + b, then saturation (x - grey) s + grey, then contrast (x - mean) c + mean.

    Saturation moves no pixel's grey (its mean over the channels), so the image's mean is that of the input plus b, and
    the three are one: c s x + c (1 - s) grey + (1 - c) mean + b, with grey and mean of the input.
    """
    b, s, c = (_per_image(p, images) for p in (brightness, saturation, contrast))
    grey = images.mean(1, keepdim=True)
    offset = (1 - c) * grey.mean((2, 3), keepdim=True) + b
    if images.shape[1] == 1:  # grey is the image itself: saturation has nothing to do
        return torch.addcmul(offset, images, c)
    return torch.addcmul(torch.addcmul(offset, grey, c * (1 - s)), images, c * s)


def _draw_crop(count: int, side: int, generator: torch.Generator) -> dict[str, Tensor]:
    pad = _rounded(CROP, side)
    return {"down": _integers(count, -pad, pad, generator), "right": _integers(count, -pad, pad, generator)}


def _crop(images: Tensor, down: Tensor, right: Tensor) -> Tensor:
    return _Shift.apply(images, down, right)


class _Shift(torch.autograd.Function):
    """Move each image by whole pixels, zeros coming in; its adjoint moves the gradient back, so it has no atomics."""

    @staticmethod
    def forward(images: Tensor, down: Tensor, right: Tensor) -> Tensor:
        if len(down) == 1:
            y, x = int(down), int(right)
            return F.pad(images, (x, -x, y, -y))
        side = images.shape[-1]
        pad = int(torch.maximum(down.abs(), right.abs()).max())
        padded = F.pad(images, (pad, pad, pad, pad))
        windows = padded.unfold(2, side, 1).unfold(3, side, 1)  # [B, C, 2 pad + 1, 2 pad + 1, H, W], a view
        y, x = _beside(pad - torch.stack([down, right]), images)
        return windows.permute(0, 2, 3, 1, 4, 5)[torch.arange(len(images), device=images.device), y, x]

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx, d_images: Tensor):
        down, right = ctx.saved_tensors
        return _Shift.apply(d_images, -down, -right), None, None


def _draw_cutout(count: int, side: int, generator: torch.Generator) -> dict[str, Tensor]:
    hole = _rounded(CUTOUT, side)
    last = side - hole % 2  # an even square is centred on a corner of pixels, of which there is one more
    return {"top": _integers(count, 0, last, generator) - hole // 2,
            "left": _integers(count, 0, last, generator) - hole // 2}


def _cutout(images: Tensor, top: Tensor, left: Tensor) -> Tensor:
    side = images.shape[-1]
    hole = _rounded(CUTOUT, side)
    pixel = torch.arange(side)
    rows, columns = ((pixel >= start[:, None]) & (pixel < start[:, None] + hole) for start in (top, left))
    return images.masked_fill(_beside(rows[:, None, :, None] & columns[:, None, None, :], images), 0)


def _draw_flip(count: int, side: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {"flip": torch.rand(count, generator=generator) < FLIP}


def _flip(images: Tensor, flip: Tensor) -> Tensor:
    if len(flip) == 1:
        return images.flip(3) if flip else images
    return torch.where(_beside(flip, images)[:, None, None, None], images.flip(3), images)


def _draw_scale(count: int, side: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {"x": _uniform(count, 1 / SCALE, SCALE, generator), "y": _uniform(count, 1 / SCALE, SCALE, generator)}


def _scale(images: Tensor, x: Tensor, y: Tensor) -> Tensor:
    zero = torch.zeros_like(x)
    return _affine(images, x, zero, zero, y)


def _draw_rotate(count: int, side: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {"degrees": _uniform(count, -ROTATE, ROTATE, generator)}


def _rotate(images: Tensor, degrees: Tensor) -> Tensor:
    angle = degrees.to(images.dtype) * (math.pi / 180)
    return _affine(images, angle.cos(), -angle.sin(), angle.sin(), angle.cos())


def _affine(images: Tensor, xx: Tensor, xy: Tensor, yx: Tensor, yy: Tensor) -> Tensor:
    """Sample each image at (xx x + xy y, yx x + yy y)."""
    matrix = torch.stack([xx, xy, yx, yy], 1).view(-1, 2, 2)
    return affine(images, _beside(matrix, images).to(torch.promote_types(images.dtype, torch.float32)))


_OPERATIONS: dict[str, tuple[Callable[[int, int, torch.Generator], dict[str, Tensor]], Callable[..., Tensor]]] = {
    "color": (_draw_color, _color),
    "crop": (_draw_crop, _crop),
    "cutout": (_draw_cutout, _cutout),
    "flip": (_draw_flip, _flip),
    "scale": (_draw_scale, _scale),
    "rotate": (_draw_rotate, _rotate),
}
ALL: tuple[str, ...] = tuple(_OPERATIONS)
