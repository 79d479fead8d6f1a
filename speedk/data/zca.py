"""ZCA whitening: the transform of `kornia.enhance.ZCAWhitening(eps, compute_inv=True)`, equal bytes for equal data.

    T = U (S + eps)^(-1/2) U^T,  T^-1 = U (S + eps)^(1/2) U^T,  U S U^T = covariance of the pixels in [0, 1] (M - 1)

An artifact stores a hash of T, not T (38 MB at 3x32x32), so T must come out the same wherever the same images are
fitted. Kornia accumulates the covariance in float32, whose last bits depend on the number of threads. Here the pixels
stay whole numbers: their products and sums are exact in float64, in any order, so the covariance is the same on every
machine; the eigen-decomposition differs by some 1e-15 between machines, and the result is rounded to multiples of
2^-18, far coarser than that and no coarser than what float32 arithmetic had lost (about 1e-6).
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from speedk.data import cache
from speedk.data.normaliser import Normaliser
from speedk.errors import DataError, TrainingError
from speedk.files import write_atomic

EPS = 0.1
"""The published tables' eps for CIFAR; Kornia's own default is 1e-6."""
MAX_VALUES = 3 * 64 * 64
"""Values of an image beyond which the matrix (their square) is refused: 0.6 GB at this limit."""

_GRID = 2.0**-18
_ROWS = 2048
"""Images handled at once: 50 MB in float64 at 3x32x32."""
_PARTS = ("mean", "matrix", "inverse")


class ZcaNormaliser(Normaliser):
    """z = (x - mean) T, and x = z T^-1 + mean, with x an image in [0, 1] as a row."""

    kind = "zca"

    def __init__(self, mean: Tensor, matrix: Tensor, inverse: Tensor, shape: tuple[int, int, int], eps: float,
                 data: str) -> None:
        self.shape, self.eps, self.data = shape, eps, data
        self.mean, self.matrix, self.inverse = mean, matrix, inverse
        self.sha256 = _digest(mean, matrix, inverse)
        self._there: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}

    def normalise(self, images: Tensor) -> Tensor:
        mean, matrix, _ = self._on(images.device)
        out = torch.empty(images.shape, dtype=torch.float32, device=images.device)
        bar = tqdm(total=len(images), desc="whitening", unit="img", delay=2, leave=False, disable=None)
        for source, target in zip(images.split(_ROWS), out.split(_ROWS), strict=True):
            rows = source.flatten(1).float()
            rows = rows.div_(255).sub_(mean) if source.dtype == torch.uint8 else rows - mean
            torch.mm(rows, matrix, out=target.flatten(1))
            bar.update(len(rows))
        bar.close()
        return out

    def unit(self, images: Tensor) -> Tensor:
        mean, _, inverse = self._on(images.device)
        return (images.float().flatten(1) @ inverse + mean).clamp_(0, 1).view(images.shape)

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, "eps": self.eps, "shape": list(self.shape), "data": self.data, "matrix": self.sha256}

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        if device not in self._there:
            self._there[device] = (self.mean.to(device), self.matrix.to(device), self.inverse.to(device))
        return self._there[device]


def fit(images: Tensor, data: str, eps: float = EPS, progress: bool = True) -> ZcaNormaliser:
    """Fit to all of `images` (uint8 [M, C, H, W]); `data` is their fingerprint. Raises DataError where the matrix would
    be too large or there are fewer than two images."""
    count, size = len(images), images[0].numel()
    if size > MAX_VALUES:
        raise DataError(f"ZCA of {'x'.join(map(str, images.shape[1:]))} images needs a matrix of {size}x{size}: "
                        "use normaliser=channel, or a resolution of 64 or less")
    if count < 2:
        raise DataError("ZCA needs two training images or more")
    gram = torch.zeros(size, size, dtype=torch.float64)
    total = torch.zeros(size, dtype=torch.float64)
    bar = tqdm(total=count, desc="fitting ZCA", unit="img", delay=2, leave=False, disable=not progress)
    with bar:
        for part in images.cpu().split(_ROWS):
            rows = part.flatten(1).double()
            gram.addmm_(rows.T, rows)
            total += rows.sum(0)
            bar.update(len(rows))
    covariance = gram.mul_(count).sub_(torch.outer(total, total)).div_(count * (count - 1) * 255.0**2)
    values, vectors = torch.linalg.eigh(covariance)
    # Rounding leaves eigenvalues that are zero slightly negative.
    values = values.clamp_(min=0).add_(eps)
    matrix, inverse = (_rounded((vectors * scale) @ vectors.T) for scale in (values.rsqrt(), values.sqrt()))
    shape = tuple(images.shape[1:])
    return ZcaNormaliser((total / (count * 255)).float(), matrix, inverse, shape, eps, data)


def fit_or_cached(images: Tensor, data: str, eps: float = EPS, progress: bool = True) -> ZcaNormaliser:
    """`fit`, kept in the cache from one run to the next."""
    path = _path(data, eps)
    try:
        found = _read(path, tuple(images.shape[1:]), eps, data)
    except DataError:  # a damaged file is as good as none: it is fitted and written again
        found = None
    if found is not None:
        return found
    fitted = fit(images, data, eps, progress)
    tensors = {name: getattr(fitted, name) for name in _PARTS}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, save(tensors, {"speedk": json.dumps(fitted.describe())}))
    except (OSError, TrainingError) as error:
        warnings.warn(f"the ZCA matrix could not be kept ({error}); pictures of what is distilled here will need it: "
                      "set SPEEDK_CACHE to a folder that can be written", stacklevel=2)
    return fitted


def from_cache(eps: float, shape: tuple[int, int, int], data: str, sha256: str) -> ZcaNormaliser:
    """The matrix that was fitted to the data with fingerprint `data`. DataError where it is not at hand or another."""
    path = _path(data, eps)
    found = _read(path, shape, eps, data)
    if found is None:
        raise DataError(f"the ZCA matrix of these data (fingerprint {data[:12]}) is not in {path.parent}: load the "
                        "same real data once, speedk.data.load(NAME, DIR), which fits it and keeps it there")
    if found.sha256 != sha256:
        raise DataError(f"the ZCA matrix in {path} is not the one described (hash {found.sha256[:12]}, not "
                        f"{sha256[:12]}): it belongs to other data or another version")
    return found


def _path(data: str, eps: float) -> Path:
    return cache.folder() / f"zca-{data[:32]}-{eps!r}.safetensors"


def _read(path: Path, shape: tuple[int, int, int], eps: float, data: str) -> ZcaNormaliser | None:
    """The cached matrix, or None where there is none. DataError where the file is not what was written."""
    size = math.prod(shape)
    if size > MAX_VALUES:
        raise DataError(f"a ZCA matrix for {'x'.join(map(str, shape))} images is larger than any that is made")
    if not path.is_file():
        return None
    damaged = DataError(f"the ZCA matrix in {path} is damaged: delete the file and load the real data again")
    try:
        with safe_open(path, framework="pt") as file:
            described = (file.metadata() or {}).get("speedk")
            tensors = {name: file.get_tensor(name) for name in _PARTS}
    except (SafetensorError, OSError):
        raise damaged from None
    wanted = {"mean": (size,), "matrix": (size, size), "inverse": (size, size)}
    if any(t.shape != wanted[n] or t.dtype != torch.float32 for n, t in tensors.items()):
        raise damaged
    found = ZcaNormaliser(*(tensors[name] for name in _PARTS), shape, eps, data)
    if described != json.dumps(found.describe()):
        raise damaged
    return found


def _rounded(matrix: Tensor) -> Tensor:
    return ((matrix + matrix.T) / (2 * _GRID)).round_().mul_(_GRID).float()


def _digest(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(memoryview(tensor.contiguous().numpy()).cast("B"))
    return digest.hexdigest()
