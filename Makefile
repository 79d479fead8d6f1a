.PHONY: install demo test lint bench kernels gpu-check wheel-check

install:
	@tools/install.sh

demo: install
	@.venv/bin/speedk demo

lint: install
	@.venv/bin/ruff check .

test: lint
	@.venv/bin/pytest

bench: install
	@.venv/bin/pytest bench/

kernels: install
	@.venv/bin/python tools/compile_kernels.py

wheel-check: install
	@tools/wheel_check.sh

gpu-check:
	@tools/gpu_check.sh
