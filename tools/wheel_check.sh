#!/bin/sh
# Build the wheel, install it into a fresh environment (which borrows the packages of .venv), and use it there, outside
# this folder.
set -eu
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
.venv/bin/python -m pip wheel -q --no-build-isolation --no-deps -w "$work" .
.venv/bin/python -m venv --without-pip "$work/venv"
site=$("$work/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
.venv/bin/python -m pip install -q --no-deps --target "$site" "$work"/speedk-*.whl
.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$site/borrowed.pth"
cd "$work"
"$work/venv/bin/python" - "$site" <<'END'
import sys
import torch
import speedk._native, speedk.kernels, speedk.ops

here = sys.argv[1]
for module in (speedk._native, speedk.kernels, speedk.ops):
    assert module.__file__.startswith(here), f"{module.__name__} came from {module.__file__}"
codes = torch.randn(2, 3, 16, 8)
kept = speedk.ops.sparsify(codes, 5)
assert (kept != 0).sum().item() == 2 * 3 * 5, "sparsify kept the wrong number"
assert speedk.ops.mhsc(kept, torch.randn(8, 12)).shape == (2, 16, 12)
print(f"the wheel works outside the checkout: {here}")
END
