#!/bin/bash
# Everything that needs a GPU, on a machine without network, in under 8 minutes: build in place, test ops and training,
# walk through the commands, look for wrong memory accesses and races, time the ops, write bench/results/. Installs
# nothing: it uses the torch, triton, pytest, hypothesis, pybind11, cmake and ninja that are there, and pytest-xdist
# where it is.
# PYTHON=... picks the interpreter; GPU_CHECK_SECONDS=... the time for all of it.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
limit=${GPU_CHECK_SECONDS:-465}  # what is not done by then is left out, and the report says so
grace=$((limit / 30 + 1))  # for a part to end once it is asked to
unset TRITON_INTERPRET SPEEDK_BACKEND
mkdir -p bench/results
report=bench/results/gpu-check.json
rm -f "$report"
site=$(mktemp -d)
mkdir "$site/speedk" "$site/logs"

parts=()  # "name seconds exit-code"
failed=0
finished=false
write_report() {  # whatever happened, and however far it came
    local rows=() wrong=() name seconds code IFS=,
    for part in "${parts[@]:+${parts[@]}}"; do
        IFS=' ' read -r name seconds code <<< "$part"
        rows+=("{\"part\": \"$name\", \"seconds\": $seconds, \"exit_code\": $code}")
        [ "$code" -eq 0 ] || wrong+=("\"$name\"")
    done
    printf '{"seconds": %d, "finished": %s, "failed": [%s], "parts": [%s]}\n' "$SECONDS" $finished \
        "${wrong[*]:+${wrong[*]}}" "${rows[*]:+${rows[*]}}" > "$report"
    cat "$report"
}
trap 'jobs -p | xargs -r kill 2>/dev/null || true; rm -rf "$site"; write_report' EXIT
trap 'exit 143' INT TERM

# A part may take so many seconds, but no more than are left once those are taken off that the parts after it need.
left() { echo $((limit - SECONDS)); }
reserve=0
at_most() {
    local most=$(($(left) - reserve - grace))
    echo $(($1 < most ? $1 : most > 1 ? most : 1))
}
note() {
    echo "== $1: exit code $3 after $2 s"
    parts+=("$1 $2 $3")
    [ "$3" -eq 0 ] || failed=1
}
part() {
    local name=$1 most since=$SECONDS code=0
    most=$(at_most "$2")
    shift 2
    echo "== $name"
    timeout -k $grace "$most" "$@" || code=$?
    note "$name" $((SECONDS - since)) $code
}
behind() {  # the same in the background; `collect` shows what it said
    local name=$1 most since=$SECONDS code=0
    most=$(at_most "$2")
    shift 2
    { timeout -k $grace "$most" "$@" > "$site/logs/$name.txt" 2>&1 &
      trap "kill $!" TERM
      wait $! || code=$?
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

part device 60 "$python" -c 'import torch
assert torch.cuda.is_available(), "PyTorch sees no GPU here"
print(torch.__version__, torch.cuda.get_device_name())'
[ $failed -eq 0 ] || exit 1
reserve=$((limit / 2))
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

reserve=$((limit / 3))
# What is not timed runs together: most of its time goes into compiling, on the CPU. Sanitizers look at our own kernels,
# not at PyTorch's; racecheck at no others at all. `warm` compiles for the benches what torch.compile is compared at.
checks=(walk training warm)
export TORCHINDUCTOR_CACHE_DIR="$site/inductor"
behind walk 200 "$python" -P tools/walk.py cuda  # each command of the package
behind training 200 env OMP_NUM_THREADS=2 "${pytest[@]}" ${spread[@]+-n 4} tests/augment tests/distillation -k cuda
behind warm 200 env OMP_NUM_THREADS=2 "${pytest[@]}" ${spread[@]+-n 4} bench/bench_freenet.py \
    -k "training and not float32"
if command -v compute-sanitizer >/dev/null; then
    only=()
    help=$(compute-sanitizer --help 2>&1 || true)  # not a pipe into grep -q, which leaves before all is said: an error
    for option in --kernel-name --kernel-regex; do
        [[ ${#only[@]} -gt 0 || "$help" != *"$option"* ]] || only=("$option" kns=speedk)
    done
    for tool in memcheck racecheck; do
        checks+=("$tool")
        behind "$tool" 200 compute-sanitizer --tool "$tool" --report-api-errors no --error-exitcode 9 \
            ${only[@]+"${only[@]}"} "$python" -P tools/sanitize_cuda.py
    done
else
    echo "compute-sanitizer is not here: wrong memory accesses were not looked for"
    note compute-sanitizer 0 127
fi
part tests 200 env OMP_NUM_THREADS=2 "${pytest[@]}" ${spread[@]+"${spread[@]}"} tests/ops
collect "${checks[@]}"
read -r _ code < "$site/logs/warm.end"
[ "$code" -eq 0 ] || rm -rf "$TORCHINDUCTOR_CACHE_DIR"  # what was killed while it compiled may be broken

reserve=0
part benches "$limit" "${pytest[@]}" bench/ --save --seconds $(($(left) - 3 * grace))  # who starts must be able to end
finished=true
exit $failed
