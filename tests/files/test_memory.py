"""How much memory is said to be free."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from speedk import memory

MB = 1 << 20


@pytest.fixture
def system(tmp_path):
    """A function that makes the files of a system: {path: text}."""

    def make(files):
        for path, text in files.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text)
        return memory.of_machine(tmp_path)

    return make


MACHINE = {"proc/meminfo": "MemTotal: 64000 kB\nMemFree:          1000 kB\nMemAvailable:    9000 kB\n"}


def test_available_is_not_what_lies_idle(system):
    assert system(MACHINE) == 9000 * 1024


def test_a_system_that_does_not_say(system):
    assert system({}) == 0


@pytest.mark.parametrize("place", ["", "a/b/"])
def test_a_group_of_version_2(system, place):
    group = f"sys/fs/cgroup/{place}"
    assert system(MACHINE | {"proc/self/cgroup": "0::/a/b\n", f"{group}memory.max": f"{5 * MB}\n",
                             f"{group}memory.current": f"{4 * MB}\n",
                             f"{group}memory.stat": f"anon 7\ninactive_file {MB}\n"}) == 2 * MB


def test_the_narrowest_group_counts(system):
    assert system(MACHINE | {
        "proc/self/cgroup": "0::/a/b\n",
        "sys/fs/cgroup/a/b/memory.max": "max\n", "sys/fs/cgroup/a/b/memory.current": f"{MB}\n",
        "sys/fs/cgroup/a/memory.max": f"{6 * MB}\n", "sys/fs/cgroup/a/memory.current": f"{3 * MB}\n",
    }) == 3 * MB  # fmt: skip


@pytest.mark.parametrize("place", ["", "docker/abc/"])
def test_a_group_of_version_1(system, place):
    group = f"sys/fs/cgroup/memory/{place}"
    files = {"proc/self/cgroup": "9:cpu:/\n4:hugetlb,memory:/docker/abc\n0::/\n",
             f"{group}memory.usage_in_bytes": f"{4 * MB}\n",
             f"{group}memory.stat": f"inactive_file 5\ntotal_inactive_file {2 * MB}\n"}
    assert system(MACHINE | files | {f"{group}memory.limit_in_bytes": f"{5 * MB}\n"}) == 3 * MB
    assert system(MACHINE | files | {f"{group}memory.limit_in_bytes": "9223372036854771712\n"}) == 9000 * 1024


def test_a_group_that_is_over_its_limit(system):
    assert system(MACHINE | {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "5\n",
                             "sys/fs/cgroup/memory.current": "9\n"}) == 0


def test_here():
    assert memory.spare(torch.device("cpu")) > 0


def test_what_the_allocator_holds_and_nothing_lives_in_is_free(monkeypatch):
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(mem_get_info=lambda _: (100, 1000),
                                                       memory_reserved=lambda _: 700, memory_allocated=lambda _: 50))
    assert memory.spare(torch.device("cuda")) == 100 + 650
