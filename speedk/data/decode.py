"""Encoded images of any kind to one uint8 array."""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from speedk.data.part import Encoded, Part
from speedk.errors import DataError

MAX_PIXELS = 2**26
"""Images with more pixels (8192 x 8192) are refused before they are decoded: a few kB may announce gigabytes."""
MAX_UNREADABLE = 0.01
"""Share of unreadable images in a part beyond which the data are not used."""

_BROKEN = (OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError, AttributeError, OverflowError,
           ArithmeticError, NotImplementedError, RuntimeError, MemoryError, struct.error, zlib.error,
           Image.DecompressionBombError)
"""What Pillow's readers raise on damaged files."""
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF", "DIB", "TGA", "MPO")
"""Raster formats only: for EPS, for one, Pillow would start another program on the file."""
_GREY = frozenset(("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N"))
_ALPHA = frozenset(("LA", "La", "PA", "RGBA", "RGBa"))
_TASK = 32


class Unreadable(Exception):
    """One image that cannot be used; its text says why."""


@dataclass
class Decoded:
    """The readable images of one part."""

    images: np.ndarray
    """uint8 [M, 3, H, W]; the three channels are equal where `grey` is true."""
    labels: np.ndarray
    """int64 [M]."""
    grey: bool
    """Every image is greyscale."""
    formats: frozenset[str]
    """File formats met ("JPEG", "PNG")."""
    smallest: int
    """The shortest side met before resizing, pixels."""
    unreadable: list[str]
    """The unreadable images: where each lies and what is wrong."""


def side_of(part: Part) -> int:
    """The side, in pixels, of the first readable image of `part`. DataError where it is not square."""
    for where, source in (image for block in part.blocks() for image in block):
        try:
            width, height = open_image(source)[0].size
        except Unreadable:
            continue
        if width != height:
            raise DataError(f"{where} is {width}x{height}, not square: give a resolution to stretch the images to")
        return width
    raise DataError(f"the {part.title} part holds no readable image")


def decode(part: Part, resolution: int, stretch: bool = True, progress: bool = True) -> Decoded:
    """Decode every image of `part` to `resolution` x `resolution` RGB.

    Images of another size are resized by stretching (antialiased bilinear); with `stretch` false they are an error.
    Transparent images are laid on white, 16-bit greyscale is scaled to 8 bits, EXIF rotation is undone, of animations
    the first frame is taken. Raises DataError where over 1% of the part is unreadable.
    """
    count = len(part.labels)
    images = np.empty((count, 3, resolution, resolution), np.uint8)
    state = _State(part.title, images, stretch)
    threads = min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    bar = tqdm(total=count, desc=f"reading {part.title} images", unit="img", delay=2, leave=False, disable=not progress)
    with warnings.catch_warnings(), bar, ThreadPoolExecutor(threads) as pool:
        # Pillow warns of large images that are refused below anyway, and of harmless oddities in metadata.
        warnings.simplefilter("ignore")
        tasks, pending = _tasks(part), deque()
        try:
            for start, block in tasks:
                pending.append(pool.submit(_decode_block, state, start, block))
                if len(pending) > 2 * threads:
                    bar.update(state.add(pending.popleft().result()))
            while pending:
                bar.update(state.add(pending.popleft().result()))
        finally:
            for task in pending:
                task.cancel()
    return state.finish(part.labels)


@dataclass
class _State:
    title: str
    images: np.ndarray
    stretch: bool
    bad: list[int] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    formats: set[str] = field(default_factory=set)
    grey: bool = True
    smallest: int = 2**31

    def add(self, result: _Result) -> int:
        self.bad += result.bad
        self.unreadable += result.unreadable
        self.formats |= result.formats
        self.grey &= result.grey
        self.smallest = min(self.smallest, result.smallest)
        if len(self.bad) > MAX_UNREADABLE * len(self.images):
            some = "; ".join(self.unreadable[:3])
            raise DataError(f"more than {MAX_UNREADABLE:.0%} of the {len(self.images)} {self.title} images cannot be "
                            f"read: {some}{'; ...' if len(self.unreadable) > 3 else ''}")
        return result.size

    def finish(self, labels: np.ndarray) -> Decoded:
        images = self.images
        if self.bad:
            images, labels = np.delete(images, self.bad, axis=0), np.delete(labels, self.bad)
        return Decoded(images, labels, self.grey, frozenset(self.formats), self.smallest, self.unreadable)


@dataclass
class _Result:
    size: int
    bad: list[int] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    formats: set[str] = field(default_factory=set)
    grey: bool = True
    smallest: int = 2**31


def _tasks(part: Part) -> Iterator[tuple[int, list[Encoded]]]:
    start = 0
    for block in part.blocks():
        for i in range(0, len(block), _TASK):
            yield start, block[i:i + _TASK]
            start += len(block[i:i + _TASK])


def _decode_block(state: _State, start: int, block: list[Encoded]) -> _Result:
    result = _Result(len(block))
    for row, (where, source) in enumerate(block, start):
        try:
            image, kind, grey = open_image(source)
            result.formats.add(kind)
            result.grey &= grey
            result.smallest = min(result.smallest, *image.size)
            side = state.images.shape[-1]
            if image.size != (side, side) and not state.stretch:
                raise DataError(f"images differ in size: {where} is {image.width}x{image.height}, the first is "
                                f"{side}x{side}; give a resolution to stretch them to")
            state.images[row] = to_array(image, side)
        except Unreadable as error:
            result.bad.append(row)
            result.unreadable.append(f"{where} ({error})")
    return result


def open_image(source: bytes | Path | None) -> tuple[Image.Image, str, bool]:
    """One image in mode L or RGB, upright, with its file format and whether it is greyscale. Raises Unreadable."""
    if not source:
        raise Unreadable("empty")
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=_formats()) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Unreadable(f"{image.width}x{image.height} pixels, more than {MAX_PIXELS}")
            kind, grey = image.format or "", image.mode in _GREY
            return _plain(ImageOps.exif_transpose(image)), kind, grey
    except _BROKEN as error:
        raise Unreadable(" ".join(str(error).split())[:120] or type(error).__name__) from None


@cache
def _formats() -> list[str]:
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]


def _plain(image: Image.Image) -> Image.Image:
    """Mode L (greyscale) or RGB of an image in any mode."""
    if image.mode in ("L", "RGB"):
        image.load()
        return image
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min(initial=0) < 0 or values.max(initial=0) > 65535:
            raise Unreadable("greyscale values outside 16 bits")
        return Image.fromarray(np.rint(values / 257.0).astype(np.uint8))
    if image.mode == "F":
        raise Unreadable("floating-point pixels, whose range is not known")
    if image.mode in _ALPHA or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("L" if image.mode in _GREY else "RGB")


def to_array(image: Image.Image, resolution: int) -> np.ndarray:
    """uint8 [C, resolution, resolution] of an L (C = 1) or RGB (C = 3) image, stretched where its size differs."""
    if image.size != (resolution, resolution):
        image = image.resize((resolution, resolution), Image.Resampling.BILINEAR)
    return np.atleast_3d(np.asarray(image)).transpose(2, 0, 1)
