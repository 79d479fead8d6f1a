#!/bin/sh
# Make .venv with speedk and its tests in it: `make demo` and `make test` call this. Quick when nothing has changed.
# PYTHON=python3.12 picks the interpreter; SPEEDK_CUDA=AUTO|ON|OFF says whether the CUDA files are compiled.
set -eu
cd "$(dirname "$0")/.."
venv=.venv
stamp=$venv/.installed
python=${PYTHON:-python3}
torch=torch==2.13.0

wanted=$(cat pyproject.toml setup.py CMakeLists.txt csrc/* tools/install.sh | cksum; echo "${SPEEDK_CUDA:-AUTO}"; pwd)
if [ -f $stamp ] && [ "$(cat $stamp)" = "$wanted" ]; then
    exit 0
fi

command -v "$python" >/dev/null || {
    echo "python3 is missing: apt-get install python3 python3-venv python3-dev"
    exit 1; }
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "$python is $("$python" -V 2>&1), speedk needs 3.10 or later: make PYTHON=python3.12 ..."; exit 1; }
"$python" -c 'import ensurepip, venv' 2>/dev/null || {
    echo "this Python cannot make environments: apt-get install python3-venv"; exit 1; }
[ -x $venv/bin/python ] || "$python" -m venv $venv
pip() { $venv/bin/python -m pip --disable-pip-version-check "$@"; }
uv() { pip install -qq uv && $venv/bin/python -m uv pip install -qq --python $venv/bin/python "$@"; }

if ! $venv/bin/python -c 'import torch' 2>/dev/null; then
    if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then
        echo "Installing PyTorch for this machine's GPU"
        uv --torch-backend=auto $torch || pip install -qq $torch
    else
        echo "Installing PyTorch, the CPU build"
        pip install -qq "$torch+cpu" 2>/dev/null || uv --torch-backend=cpu $torch 2>/dev/null || {
            echo "No CPU build was found; installing the default one, which is large (over 2 GB)"
            pip install -qq $torch; }
    fi
fi

echo "Installing speedk and what it needs"
pip install -qq "setuptools>=64" wheel "pybind11>=2.12" "cmake>=3.18" ninja
rm -f speedk/_native*.so  # one from before would hide that this one cannot be built
# No isolated build: it would fetch the build tools again, and speedk itself needs no torch to build.
pip install -qq --no-build-isolation -e ".[test]"
$venv/bin/python - <<'END'
import importlib.util, sys
if importlib.util.find_spec("speedk._native") is None:
    sys.stdout.flush()
    print("The native extension could not be built, speedk goes on without it and is slower. Why: "
          "`.venv/bin/python setup.py build_ext` (it needs g++ and Python.h: apt-get install g++ python3-dev)")
END
echo "$wanted" > $stamp
