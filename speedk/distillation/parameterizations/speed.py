"""SPEED: tokens shared by all patches, sparse codes for each image, and a small recurrent decoder."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from speedk import ops
from speedk.distillation.budget import solve, speed_storage
from speedk.distillation.freenet import SHARED, FReeNet
from speedk.distillation.parameterizations._fit import fit
from speedk.distillation.parameterizations.base import (
    Parameterization,
    ParameterizationSpec,
    class_labels,
    expect_tensors,
)
from speedk.errors import ArtifactError, ConfigError
from speedk.geometry import Geometry
from speedk.ops.freenet import NORMS
from speedk.workers import Pool

INITS = ("random", "fit")
FIT_TO = ("centers", "random")
SPARSE = ("end", "always")
SPARSIFY = ("global", "local")
MAX_CODE = 1 << 27
MAX_CONVOLUTIONS = 8
PENALISED = 1 << 22
"""Entries of codes that are penalised at a time, about."""


@dataclass(frozen=True)
class Spec(ParameterizationSpec):
    """Recipe fields; sizes are the paper's letters.

    images_per_class: N/c, decoded images of a class. D: dimension of a token. K: tokens. H: heads. R: blocks.
    k: entries kept of each code. patch: side of a patch, pixels. penalty: lambda of Eq. 5; a negative value means the
    paper's rule 0.064 / (N H J). norm: where LN1 stands (see FReeNet). init: "random", the paper's, or "fit", a least
    squares fit, of fit_steps, to real images that fit_to chooses: "centers" of clusters of their class, or "random".
    sparse: "end", the paper's top-k after training, or "always", top-k in every decode with the gradient passed to all
    entries (straight-through): what is matched is then what is stored.
    sparsify: "global", the k largest entries of a code, or "local", the k / J largest of each patch.
    shared: what the blocks share, "both" tokens and codes, the tokens ("saet"), or "none". convolutions, kernel: layers
    on the image and their side (see FReeNet for these three).
    """

    images_per_class: int
    D: int
    K: int
    H: int
    R: int
    k: int
    patch: int
    penalty: float = -1.0
    norm: str = "branch"
    init: str = "fit"
    sparse: str = "always"
    fit_steps: int = 600
    fit_to: str = "centers"
    sparsify: str = "global"
    shared: str = "both"
    convolutions: int = 0
    kernel: int = 3

    def check(self, geometry: Geometry) -> None:
        """Raise ConfigError where the sizes do not go together."""
        for name in ("images_per_class", "D", "K", "H", "R", "patch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        for name, allowed in (("norm", NORMS), ("init", INITS), ("fit_to", FIT_TO), ("sparse", SPARSE),
                              ("sparsify", SPARSIFY), ("shared", SHARED)):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name}={getattr(self, name)!r} is not one of {', '.join(allowed)}")
        if geometry.resolution % self.patch:
            raise ConfigError(f"patch={self.patch} does not divide a resolution of {geometry.resolution}")
        if self.D % self.H:
            raise ConfigError(f"D={self.D} is not a multiple of H={self.H} heads")
        J = self.patches(geometry)
        if max(J, self.K) > 65536:
            raise ConfigError(f"J={J} patches and K={self.K} tokens must be at most 65,536: coordinates have 16 bits")
        if self.heads * J * self.K > MAX_CODE:
            raise ConfigError(f"H J K = {self.heads * J * self.K:,} is over {MAX_CODE:,}: a dense code would take "
                              "512 MB")
        if not 1 <= self.k <= J * self.K:
            raise ConfigError(f"k={self.k} is outside 1 to J K = {J * self.K}")
        if self.sparsify == "local" and self.k % J:
            raise ConfigError(f"k={self.k} is not a multiple of J={J} patches, each of which keeps k / J entries where "
                              "sparsify=local")
        if self.penalty < 0 and self.penalty != -1:
            raise ConfigError(f"penalty={self.penalty:g} must not be negative; -1 means the paper's rule")
        if self.fit_steps < 0:
            raise ConfigError(f"fit_steps={self.fit_steps} must not be negative")
        if not 0 <= self.convolutions <= MAX_CONVOLUTIONS:
            raise ConfigError(f"convolutions={self.convolutions} is outside 0 to {MAX_CONVOLUTIONS}")
        if not 1 <= self.kernel <= geometry.resolution or self.kernel % 2 == 0:
            raise ConfigError(f"kernel={self.kernel} is not an odd number from 1 to {geometry.resolution}")

    @property
    def heads(self) -> int:
        """Heads of a code: H, or H for each block that has codes of its own."""
        return self.H if self.shared == "both" else self.R * self.H

    @property
    def tokens(self) -> tuple[int, ...]:
        """The shape of the tokens."""
        return (self.R, self.K, self.D) if self.shared == "none" else (self.K, self.D)

    def decoder(self, geometry: Geometry) -> FReeNet:
        return FReeNet(self.D, self.R, geometry.channels, self.patch, self.patches(geometry), self.norm, self.shared,
                       self.convolutions, self.kernel)

    def patches(self, geometry: Geometry) -> int:
        return (geometry.resolution // self.patch) ** 2

    def weight(self, geometry: Geometry) -> float:
        """lambda, by the paper's rule (appendix I) unless given."""
        images = self.images_per_class * geometry.classes
        return self.penalty if self.penalty >= 0 else 0.064 / (images * self.H * self.patches(geometry))


class Speed(Parameterization):
    """N = classes * images_per_class images as FReeNet(E, A_i) (Eq. 2)."""

    Spec = Spec
    name = "speed"
    OUTER: ClassVar = {"optimizer": "adam", "schedule": "cosine"}

    def __init__(self, spec: Spec, geometry: Geometry, ipc: int, labels: list[int] | None = None) -> None:
        super().__init__(spec, geometry, ipc)
        counts = [spec.images_per_class] * geometry.classes if labels is None else labels
        self.register_buffer("classes", class_labels(counts), persistent=False)
        self.patches = spec.patches(geometry)
        self.saet = nn.Parameter(torch.zeros(spec.tokens))
        self.freenet = spec.decoder(geometry)
        self.scm: nn.Parameter | None = None
        if labels is None:
            self.scm = nn.Parameter(torch.zeros(self.size, spec.heads, self.patches, spec.K))
        self.stored: tuple[Tensor, Tensor, Tensor] | None = None

    @torch.no_grad()
    def initialise(self, real, generator: torch.Generator, progress=None) -> None:
        for tensor in (self.saet, self.scm):  # drawn on the CPU, as the generator is there
            tensor.copy_(torch.empty_like(tensor, device="cpu").normal_(0, 0.2, generator=generator))
        self.freenet.reset(generator)
        if self.spec.init == "fit" and self.spec.fit_steps:
            fit(self, real, generator, progress)

    def codes(self, index: Tensor | None = None) -> Tensor:
        """The dense codes that are decoded in training: all of them, or those of `index`."""
        scm = self.scm if index is None else self.scm[index]
        return _TopK.apply(scm, self) if self.spec.sparse == "always" else scm

    def sparsify(self, scm: Tensor, k: int) -> Tensor:
        """`scm` with k entries of each head kept (Eq. 6), or k // J of each patch where sparsify is "local"."""
        check = False if scm.is_cuda else None  # asking would have the host wait; `Run.check` looks for what is NaN
        if self.spec.sparsify == "global":
            return ops.sparsify(scm, k, check=check)
        return ops.sparsify(_by_patch(scm), k // self.patches, check=check).view_as(scm)

    def decode(self, index: Tensor) -> tuple[Tensor, Tensor]:
        labels = self.classes[index]
        if self.stored is None:
            return self.freenet(self.codes(index), self.saet), labels
        values, rows, cols = (part[index.to(part.device)] for part in self.stored)
        return self.freenet.decode(values, rows, cols, self.saet), labels

    def accumulate(self, index: Tensor, d_images: Tensor, d_labels: Tensor | None = None,
                   pool: Pool | None = None) -> None:
        pool = pool or Pool(index.device, threads=1)
        piece = pool.images(self.geometry.resolution)
        shared = [self.saet, *self.freenet.parameters()]
        found = pool.map(self._gradients, zip(index.split(piece), d_images.split(piece)))
        for tensor in (self.scm, *shared):
            if tensor.grad is None:
                tensor.grad = torch.zeros_like(tensor)
        for rows, (of_codes, *of_shared) in zip(index.split(piece), found):
            self.scm.grad.index_add_(0, rows, of_codes)
            for tensor, gradient in zip(shared, of_shared, strict=True):
                tensor.grad += gradient

    def _gradients(self, index: Tensor, d_images: Tensor) -> tuple[Tensor, ...]:
        """Of sum(images * d_images): for the codes of `index`, the tokens and the decoder's parameters."""
        # A gather's own backward fills a gradient as large as all codes each time; a leaf of its rows does not.
        with torch.enable_grad():
            rows = self.scm.detach()[index].requires_grad_()
            codes = _TopK.apply(rows, self) if self.spec.sparse == "always" else rows
            images = self.freenet(codes, self.saet)
        return torch.autograd.grad(images, [rows, self.saet, *self.freenet.parameters()], d_images)

    def penalty(self) -> Tensor:
        """lambda times the sum of |A| over all codes (Eq. 5)."""
        return self.spec.weight(self.geometry) * self.scm.abs().sum()

    @torch.no_grad()
    def accumulate_penalty(self) -> float:
        """The same a few codes at a time: autograd would hold three more arrays of the size of all codes."""
        if self.scm.grad is None:
            self.scm.grad = torch.zeros_like(self.scm)
        weight, total = self.spec.weight(self.geometry), torch.zeros((), dtype=torch.float64, device=self.scm.device)
        images = max(1, PENALISED // max(1, self.scm[0].numel()))
        for codes, gradient in zip(self.scm.split(images), self.scm.grad.split(images)):
            gradient.add_(codes.sign(), alpha=weight)
            total += codes.abs().sum()
        return weight * float(total)

    def param_groups(self) -> list[dict[str, Any]]:
        return [
            {"name": "saet", "params": [self.saet], "lr": 0.01},
            {"name": "scm", "params": [self.scm], "lr": 0.01},
            {"name": "freenet", "params": list(self.freenet.parameters()), "lr": 0.001},
        ]

    @torch.no_grad()
    def finalize(self) -> None:
        if self.stored is None:
            self.stored = self._encoded()
            self.scm = None

    def _encoded(self) -> tuple[Tensor, Tensor, Tensor]:
        """Values, rows and columns [N, heads, k] of the entries that are kept, in the order of their place."""
        if self.spec.sparsify == "global":
            return ops.coo_encode(self.scm, self.spec.k)
        each = self.spec.k // self.patches
        values, _, cols = (part.view(self.size, -1, self.spec.k) for part in ops.coo_encode(_by_patch(self.scm), each))
        dtype = ops.index_dtype(max(self.patches, self.spec.K))
        rows = torch.arange(self.patches, device=values.device).repeat_interleave(each).to(dtype)
        return values, rows.expand_as(values).contiguous(), cols.to(dtype)

    def storage(self) -> dict[str, Tensor]:
        values, rows, cols = self.stored
        tensors = {"saet": self.saet, "scm.values": values, "scm.rows": rows, "scm.cols": cols}
        tensors |= {f"freenet.{name}": tensor for name, tensor in self.freenet.named_parameters()}
        return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def density(self, index: Tensor) -> Tensor:
        """Entries of all heads in each patch (the paper's Figure III)."""
        values, rows, _ = (part[index.to(part.device)].flatten(1) for part in self.stored)
        counts = torch.zeros(len(index), self.patches, dtype=torch.int64, device=values.device)
        side = math.isqrt(self.patches)
        return counts.scatter_add_(1, rows.long(), (values != 0).long()).view(-1, side, side)

    def whole(self) -> Speed:
        return Speed(dataclasses.replace(self.spec, sparse="end"), self.geometry, self.ipc)

    def left_out(self, whole: Speed) -> list[str]:
        kept = float(self.stored[0].abs().sum() / whole.scm.abs().sum().clamp(min=1e-30))
        said = [f"kept: {self.spec.k:,} of {whole.scm[0, 0].numel():,} entries of a code, {kept:.1%} of the sum of |A|"]
        if self.spec.sparse == "always":
            said.append("sparse=always: training decoded the kept entries alone, so what stands before is no image "
                        "that was trained; the paper's picture is that of sparse=end")
        return said

    @classmethod
    def from_storage(cls, spec: Spec, geometry: Geometry, ipc: int, labels: list[int],
                     tensors: Mapping[str, Tensor]) -> Speed:
        J, entries = spec.patches(geometry), (sum(labels), spec.heads, spec.k)
        if len(tensors) < spec.R:
            raise ArtifactError(f"R={spec.R} blocks but {len(tensors)} tensors")
        index = ops.index_dtype(max(J, spec.K))
        with torch.device("meta"):
            shapes = {f"freenet.{name}": (tuple(p.shape), torch.float32) for name, p in
                      spec.decoder(geometry).named_parameters()}
        expect_tensors(tensors, shapes | {
            "saet": (spec.tokens, torch.float32),
            "scm.values": (entries, torch.float32), "scm.rows": (entries, index), "scm.cols": (entries, index),
        })
        rows, cols = tensors["scm.rows"].long(), tensors["scm.cols"].long()
        if rows.numel() and (int(rows.max()) >= J or int(cols.max()) >= spec.K):
            raise ArtifactError(f"a coordinate is out of range: rows must be below J={J} and cols below K={spec.K}")
        if spec.k > 1 and bool(((rows * spec.K + cols).diff(dim=-1) <= 0).any()):
            raise ArtifactError("the coordinates of a code are not in order, or one is there twice")
        if spec.sparsify == "local" and bool((rows != torch.arange(J).repeat_interleave(spec.k // J)).any()):
            raise ArtifactError(f"a patch does not have the k / J = {spec.k // J} entries of sparsify=local")
        loaded = cls(spec, geometry, ipc, labels)
        loaded.saet = nn.Parameter(tensors["saet"])
        loaded.freenet.load_state_dict({name.removeprefix("freenet."): tensors[name] for name in shapes}, assign=True)
        loaded.stored = tensors["scm.values"], tensors["scm.rows"], tensors["scm.cols"]
        return loaded.requires_grad_(False)

    @classmethod
    def sizes(cls, geometry: Geometry, ipc: int) -> dict[str, int]:
        return solve(geometry, ipc)

    @classmethod
    def planned_storage(cls, spec: Spec, geometry: Geometry, ipc: int) -> dict[str, float]:
        parts = speed_storage(N=spec.images_per_class * geometry.classes, D=spec.D, K=spec.K, H=spec.heads, R=spec.R,
                              k=spec.k, J=spec.patches(geometry), L=spec.patch**2 * geometry.channels)
        parts["saet"] = math.prod(spec.tokens)
        if spec.convolutions:
            parts["convolutions"] = spec.convolutions * geometry.channels * (geometry.channels * spec.kernel**2 + 1)
        return parts


def _by_patch(scm: Tensor) -> Tensor:
    """[N, H, J, K] -> [N, H J, 1, K]: each patch a code of its own."""
    return scm.flatten(1, 2).unsqueeze(2)


class _TopK(torch.autograd.Function):
    """`Speed.sparsify` whose backward lets the gradient of every entry through (straight-through)."""

    @staticmethod
    def forward(ctx, scm: Tensor, of: Speed) -> Tensor:
        return of.sparsify(scm, of.spec.k)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


PLUGIN = Speed
