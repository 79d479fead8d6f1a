"""How much memory this process may still take."""

from __future__ import annotations

import contextlib
from pathlib import Path, PurePosixPath

import torch


def spare(device: torch.device) -> int:
    """Bytes of `device` that are free for use: on a GPU with what PyTorch holds and nothing lives in; on the CPU within
    the machine and within every control group that the process is in. 0 where the system does not say."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    return of_machine()


def of_machine(root: Path = Path("/")) -> int:
    """Bytes that a process of the system at `root` may take before it is swapped out or killed."""
    machine = _numbers(root / "proc/meminfo").get("MemAvailable:", 0) * 1024
    return max(0, min([machine, *_of_groups(root)]))


def _of_groups(root: Path) -> list[int]:
    """What each control group above this process has left: its limit less what it uses, the file cache that it can
    give back not counted. Version 2 has one tree of groups, version 1 one for memory."""
    left: list[int] = []
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                trees, limit, used, cache = ("", "unified"), "memory.max", "memory.current", "inactive_file"
            elif "memory" in controllers.split(","):
                trees, limit, used = ("memory",), "memory.limit_in_bytes", "memory.usage_in_bytes"
                cache = "total_inactive_file"
            else:
                continue
            inside = PurePosixPath(path.lstrip("/"))
            for tree in trees:
                # In a container the path can be the host's, and the group is at the root of what is mounted.
                for group in (inside, *inside.parents):
                    folder = root / "sys/fs/cgroup" / tree / group
                    with contextlib.suppress(OSError, ValueError):  # no such group, or "max"
                        spent = int((folder / used).read_text()) - _numbers(folder / "memory.stat").get(cache, 0)
                        left.append(int((folder / limit).read_text()) - spent)
    return left


def _numbers(path: Path) -> dict[str, int]:
    """The lines `name number ...` of a file; none where there is no such file."""
    found: dict[str, int] = {}
    with contextlib.suppress(OSError):
        for line in path.read_text().splitlines():
            name, _, rest = line.partition(" ")
            with contextlib.suppress(ValueError, IndexError):
                found[name] = int(rest.split()[0])
    return found
