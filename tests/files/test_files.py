"""Atomic writes: whole at every instant, and one line where the system refuses."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from speedk.errors import TrainingError
from speedk.files import check_writable, locked, sweep, write_atomic


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def refuses(path, *words, data=b"new"):
    with pytest.raises(TrainingError) as caught:
        write_atomic(path, data)
    line = str(caught.value)
    assert "\n" not in line and str(path) in line
    for word in words:
        assert word in line


def test_writes_and_replaces(tmp_path):
    path = tmp_path / "a.bin"
    write_atomic(path, b"one")
    write_atomic(str(path), lambda stream: stream.write(b"two"))
    assert path.read_bytes() == b"two"
    assert names(tmp_path) == ["a.bin"]


def test_new_file_has_the_usual_mode(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    write_atomic(tmp_path / "atomic", b"")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_lock_file_has_the_usual_mode(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    with locked(tmp_path / "lock") as mine:
        assert mine and (tmp_path / "lock").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()])
def test_failure_keeps_the_old_file_and_leaves_no_litter(tmp_path, error):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def write(stream):
        stream.write(b"half of the new")
        raise error

    with pytest.raises(type(error)):
        write_atomic(path, write)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("code, mend", [
    (errno.ENOSPC, "free some space"), (errno.EDQUOT, "quota"), (errno.EIO, "elsewhere"), (errno.EACCES, "writable"),
    (errno.EROFS, "read-only: write elsewhere"),
])
def test_the_system_refuses_half_way(tmp_path, code, mend):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def write(stream):
        stream.write(b"half of the new")
        raise OSError(code, os.strerror(code))

    refuses(path, os.strerror(code), mend, data=write)
    assert path.read_bytes() == b"old" and names(tmp_path) == ["a.bin"]


def test_a_real_refusal_while_writing(tmp_path):
    """A limit on file size makes the system refuse half-way through (as a full disk does)."""
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, old[1]))
    try:
        refuses(path, "ulimit", data=bytes(1 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == b"old" and names(tmp_path) == ["a.bin"]


def test_missing_folder_and_folder_as_a_file(tmp_path):
    refuses(tmp_path / "nowhere" / "a.bin", "create the folder")
    refuses(tmp_path, "name a file in it")
    (tmp_path / "file").write_bytes(b"")
    refuses(tmp_path / "file" / "a.bin", "not a folder")
    refuses(tmp_path / ("n" * 300), "shorter name")
    assert names(tmp_path) == ["file"]


def test_a_refusal_is_known_beforehand(tmp_path, monkeypatch):
    check_writable(tmp_path / "a.bin")
    (tmp_path / "a.bin").write_bytes(b"old")
    check_writable(tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == b"old" and names(tmp_path) == ["a.bin"]
    for path, mend in ((tmp_path / "nowhere" / "b.bin", "create the folder"), (tmp_path, "name a file in it"),
                       (tmp_path / "a.bin" / "b.bin", "not a folder")):
        with pytest.raises(TrainingError, match=mend):
            check_writable(path)

    def refuse(*_, **__):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))

    monkeypatch.setattr(Path, "touch", refuse)  # as /proc does, whose folders take no new files
    with pytest.raises(TrainingError, match="No such file or directory; write elsewhere"):
        check_writable(tmp_path / "b.bin")


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    write_atomic(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_bytes() == b"new"


def test_kills_leave_a_whole_file(tmp_path):
    path = tmp_path / "a.bin"
    script = (
        "import itertools, sys\n"
        "from speedk.files import write_atomic\n"
        "for i in itertools.count():\n"
        "    write_atomic(sys.argv[1], bytes([i % 256]) * 300_000)\n"
        "    print(i, flush=True)\n"
    )
    for attempt in range(6):
        child = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE)
        child.stdout.readline()  # it is in its loop from here on
        time.sleep(0.003 * attempt)
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        data = path.read_bytes()
        assert len(data) == 300_000 and data == data[:1] * len(data)
    sweep(tmp_path)
    assert names(tmp_path) == ["a.bin"]
