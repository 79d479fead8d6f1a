"""speedk doctor: what is built here, which backend each op takes, and why not the others."""

from __future__ import annotations

import argparse

from speedk.text import table

HELP = "Print what is built, which backend each op takes here, and why not the others."
EPILOG = """\
examples:
  speedk doctor
  SPEEDK_BACKEND=torch speedk doctor
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(args: argparse.Namespace) -> int:
    import platform

    import torch

    import speedk
    from speedk.ops import dispatch

    native = dispatch.native()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    facts = {
        "speedk": speedk.__version__,
        "Python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "GPU": ", ".join(gpus) or "none",
        "Triton": dispatch.triton_missing() or "ready",
        "native": dispatch.native_missing() or f"built; {native.isa()}, threads of {native.parallel_backend()}",
        "CUDA kernels": dispatch.native_cuda_missing() or "compiled",
        "forced backend": dispatch.forced() or "none",
    }
    print("\n".join(f"{name:<16}{value}" for name, value in facts.items()))
    print()
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    print("\n\n".join(table(_choices(device)) for device in devices))
    return 0


def _choices(device: str) -> list[tuple[str, ...]]:
    from speedk.ops import dispatch

    rows = [(f"op on {'the GPU' if device == 'cuda' else 'the CPU'}", "takes", "why not the others")]
    for op in dispatch.ops():
        found = dispatch.installed(op, device)
        chosen = next((b for b, said in found.items() if said == "chosen"), "nothing")
        others = [f"{b}: {said}" for b, said in found.items() if said not in ("chosen", "available")]
        rows.append((op, chosen, "; ".join(others)))
    return rows
