"""No launch asks for a grid that a GPU does not take: 65,535 programs along y and z, 2^31 - 1 along x."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from speedk.kernels import _sums, coo


class Recorder:
    """Stands where a kernel does, and notes the grids it is launched on."""

    def __init__(self, grids: list[tuple[int, ...]]):
        self.grids = grids

    def __getitem__(self, grid):
        self.grids.append(grid)
        return lambda *arguments, **meta: None


@pytest.mark.parametrize("k", [48, 2_200_000, 20_000_000])
def test_many_entries(k, monkeypatch):
    grids: list[tuple[int, ...]] = []
    kernels = [(module, name) for module in (coo, _sums) for name in vars(module) if name.endswith("_kernel")]
    for module, name in kernels:
        monkeypatch.setattr(module, name, Recorder(grids))
    J, K, D = 8192, 4096, 32
    sizes = (2, 1, k), (2, 1, J, K), (K, D), (2, J, D)
    values, dense, saet, out = (torch.empty(size, device="meta") for size in sizes)
    index = torch.empty(values.shape, dtype=torch.uint16, device="meta")
    coo.coo_decode_fwd(values, index, index, J, K)
    coo.coo_decode_bwd(dense, index, index)
    coo.mhsc_coo_fwd(values, index, index, saet, J)
    coo.mhsc_coo_bwd(out, values, index, index, saet)
    assert len(grids) == len(kernels)
    for grid in grids:
        assert 0 < grid[0] < 2**31 and all(0 < size < 2**16 for size in grid[1:]), grid
