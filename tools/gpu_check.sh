#!/bin/bash
# Everything that needs a GPU, on a machine without network: build in place, test the ops on the GPU, look for wrong
# memory accesses, time the ops. Installs nothing: it uses the torch, triton, pytest and pybind11 that are there.
# PYTHON=... picks the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
started=$SECONDS
report=bench/results/gpu-check.json
mkdir -p bench/results

"$python" -c 'import torch; assert torch.cuda.is_available(), "PyTorch sees no GPU here"; print(torch.__version__, torch.cuda.get_device_name())'
SPEEDK_CUDA=ON "$python" setup.py -q build_ext --inplace

# The package is used from this folder without being installed: kernels/ becomes speedk.kernels by a link outside it.
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
mkdir "$site/speedk"
for part in speedk/*; do ln -s "$PWD/$part" "$site/speedk/"; done
ln -s "$PWD/kernels" "$site/speedk/kernels"
export PYTHONPATH="$site"

failed=()
part() {
    local name=$1 since=$SECONDS
    shift
    echo "== $name"
    "$@" || failed+=("$name")
    echo "== $name took $((SECONDS - since)) s"
}
run() { "$python" -P -c 'import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))' "$@"; }

part tests run tests/ops tests/test_compile_offline.py tests/test_compile_cuda.py
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
        part "$tool" compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" -P tools/sanitize_cuda.py
    done
else
    echo "compute-sanitizer is not here: wrong memory accesses were not looked for"
    failed+=(compute-sanitizer)
fi
part benches run bench/ --save

printf '{"seconds": %d, "failed": [%s]}\n' $((SECONDS - started)) \
    "$(printf '"%s",' ${failed[@]+"${failed[@]}"} | sed 's/^"",$//; s/,$//')" > "$report"
cat "$report"
[ ${#failed[@]} -eq 0 ]
