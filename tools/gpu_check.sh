#!/bin/bash
# Everything that needs a GPU, on a machine without network, in under 8 minutes: build in place, test ops and training,
# look for wrong memory accesses and races, time the ops, write bench/results/. Installs nothing: it uses the torch,
# triton, pytest, hypothesis, pybind11, cmake and ninja that are there, and pytest-xdist where it is.
# PYTHON=... picks the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
limit=465  # seconds for all of it; what is not done by then is left out, and the report says so
unset TRITON_INTERPRET SPEEDK_BACKEND
mkdir -p bench/results
report=bench/results/gpu-check.json
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
mkdir "$site/speedk" "$site/logs"

left() { echo $((limit - SECONDS)); }
parts=()  # "name seconds exit-code"
failed=0
note() {
    echo "== $1: exit code $3 after $2 s"
    parts+=("$1 $2 $3")
    [ "$3" -eq 0 ] || failed=1
}
part() {
    local name=$1 most=$2 since=$SECONDS code=0
    shift 2
    echo "== $name"
    timeout -k 15 "$most" "$@" || code=$?
    note "$name" $((SECONDS - since)) $code
}
behind() {  # the same in the background; `collect` shows what it said
    local name=$1 most=$2 since=$SECONDS code=0
    shift 2
    { timeout -k 15 "$most" "$@" > "$site/logs/$name.txt" 2>&1 || code=$?
      echo $((SECONDS - since)) $code > "$site/logs/$name.end"; } &
}
collect() {
    local name seconds code
    wait
    for name in "$@"; do
        tail -n 700 "$site/logs/$name.txt"
        read -r seconds code < "$site/logs/$name.end"
        note "$name" "$seconds" "$code"
    done
}

"$python" -c 'import torch
assert torch.cuda.is_available(), "PyTorch sees no GPU here"
print(torch.__version__, torch.cuda.get_device_name())'
part build 200 env SPEEDK_CUDA=ON "$python" setup.py -q build_ext --inplace
if [ $failed -ne 0 ]; then
    echo "the extension does not build: nothing else was tried"
    exit 1
fi

# The package is used from this folder without being installed: kernels/ becomes speedk.kernels by a link outside it.
for file in speedk/*; do ln -s "$PWD/$file" "$site/speedk/"; done
ln -s "$PWD/kernels" "$site/speedk/kernels"
export PYTHONPATH="$site"
pytest=("$python" -P -c 'import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))')
spread=()
"$python" -c 'import xdist' 2>/dev/null && spread=(-n 10)  # most of the time goes into compiling kernels, on the CPU

# What is not timed runs together. Sanitizers look at our own kernels, not at PyTorch's; racecheck at no others at all.
checks=(compile)
behind compile 240 sh -c '"$0" tools/compile_kernels.py && "$@" tests/test_compile_offline.py tests/test_compile_cuda.py' \
    "$python" "${pytest[@]}"
if command -v compute-sanitizer >/dev/null; then
    only=()
    for option in --kernel-name --kernel-regex; do
        if [ ${#only[@]} -eq 0 ] && compute-sanitizer --help 2>&1 | grep -q -e "$option"; then
            only=("$option" kns=speedk)
        fi
    done
    for tool in memcheck racecheck; do
        checks+=("$tool")
        behind "$tool" 240 compute-sanitizer --tool "$tool" --report-api-errors no --error-exitcode 9 \
            ${only[@]+"${only[@]}"} "$python" -P tools/sanitize_cuda.py
    done
else
    echo "compute-sanitizer is not here: wrong memory accesses were not looked for"
    note compute-sanitizer 0 127
fi
part tests 270 env OMP_NUM_THREADS=2 "${pytest[@]}" ${spread[@]+"${spread[@]}"} tests/ops
part training 90 env OMP_NUM_THREADS=2 "${pytest[@]}" ${spread[@]+"${spread[@]}"} tests/augment tests/distillation -k cuda
collect "${checks[@]}"

# A bench that starts must be able to end, and the report be written.
part benches $(($(left) > 45 ? $(left) : 45)) "${pytest[@]}" bench/ --save --seconds $(($(left) > 60 ? $(left) - 30 : 30))

"$python" - "$report" "$SECONDS" "${parts[@]}" <<'END'
import json, sys
path, seconds, *parts = sys.argv[1:]
rows = [dict(zip(("part", "seconds", "exit_code"), (p.split()[0], *map(int, p.split()[1:])))) for p in parts]
failed = [row["part"] for row in rows if row["exit_code"]]
open(path, "w").write(json.dumps({"seconds": int(seconds), "failed": failed, "parts": rows}, indent=1) + "\n")
END
cat "$report"
exit $failed
