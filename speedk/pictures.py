"""Grids of images as PNG: a row per class, its name drawn at the left."""

from __future__ import annotations

import io
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from torch import Tensor

_CELL = 64  # small images are enlarged, by a whole factor, to about this many pixels
_GAP = 2
_MARGIN = 8
_FONT = 15
_PAPER, _INK = (255, 255, 255), (32, 32, 32)
_MAX_NAME = 28
_NONE = (0.62, 0.62, 0.62)  # where there is nothing to count, which is more than "few"
_HEAT = ((0.16, 0.09, 0.38), (0.72, 0.18, 0.37), (0.98, 0.65, 0.23), (1.0, 0.98, 0.80))  # from little to much


def to_bytes(images: Tensor) -> np.ndarray:
    """uint8 [N, H, W, C] of brightness [N, C, H, W]: clipped to 0 to 1 and rounded to 256 steps."""
    return (images.detach().cpu().float().clamp(0, 1) * 255).round().numpy().astype(np.uint8).transpose(0, 2, 3, 1)


def to_image(pixels: np.ndarray) -> Image.Image:
    """A picture of uint8 [H, W, C], C 1 or 3."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def png(image: Image.Image) -> bytes:
    """The bytes of a PNG file; equal pictures give equal bytes."""
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def grid(rows: Sequence[Tensor], names: Sequence[str]) -> bytes:
    """PNG of a grid with a row per entry of `rows`, each with the name at its place in `names` drawn to its left.

    rows: brightness [n, C, H, W] each (0 to 1; what lies outside is clipped), C 1 or 3, all of one size, n may differ.
    Images under 64 pixels are enlarged by a whole factor with hard edges, so that a pixel stays a pixel.
    """
    names = [_short(name) for name in names[:len(rows)]]
    side = rows[0].shape[-1]
    scale = max(1, round(_CELL / side))
    cell = side * scale
    font = ImageFont.load_default(_FONT)
    boxes = [font.getbbox(name) for name in names]
    left = 2 * _MARGIN + max(round(box[2]) for box in boxes)
    columns = max(len(row) for row in rows)
    pitch = max(cell, _FONT + 4) + _GAP
    size = left + columns * (cell + _GAP) - _GAP + _MARGIN, len(rows) * pitch - _GAP + 2 * _MARGIN
    sheet = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, row in enumerate(rows):
        top = _MARGIN + i * pitch
        draw.text((_MARGIN, top + (pitch - _GAP) / 2), names[i], _INK, font, anchor="lm")
        for j, pixels in enumerate(to_bytes(row)):
            tile = to_image(pixels).resize((cell, cell), Image.Resampling.NEAREST)
            sheet.paste(tile, (left + j * (cell + _GAP), top))
    return png(sheet)


def heat(values: Tensor, top: float, side: int) -> Tensor:
    """Brightness [n, 3, side, side] of maps [n, rows, columns] of numbers from 0 to `top`: dark where they are small,
    pale at `top`, and grey where they are zero. rows and columns must divide side."""
    place = (values.double() / max(top, 1e-12)).clamp(0, 1) * (len(_HEAT) - 1)
    left = place.floor().clamp(max=len(_HEAT) - 2)
    stops = values.new_tensor(_HEAT, dtype=place.dtype)
    below, above = stops[left.long()], stops[left.long() + 1]
    colours = below + (place - left).unsqueeze(-1) * (above - below)
    colours[values == 0] = values.new_tensor(_NONE, dtype=place.dtype)
    rows, columns = values.shape[1:]
    return colours.repeat_interleave(side // rows, 1).repeat_interleave(side // columns, 2).movedim(-1, 1).float()


def _short(name: str) -> str:
    """The name as the built-in font can draw it: without accents, "?" for other scripts, cut where it is long."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", name) if not unicodedata.combining(c))
    plain = plain.encode("ascii", "replace").decode()
    return plain if len(plain) <= _MAX_NAME else plain[: _MAX_NAME - 3] + "..."
