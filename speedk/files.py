"""Files that are whole at every instant: each write goes to a temporary file that takes the place of the old one."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from speedk.errors import TrainingError

_SUFFIX = ".partial"
_MENDS = {
    errno.ENOSPC: "free some space on that disk, or write elsewhere",
    errno.EDQUOT: "free some space in your quota, or write elsewhere",
    errno.EFBIG: "the file system or a limit (ulimit -f) does not take a file this large: write elsewhere",
    errno.EACCES: "make the folder writable, or write elsewhere",
    errno.EPERM: "make the folder writable, or write elsewhere",
    errno.EROFS: "that file system is read-only: write elsewhere",
    errno.ENOTDIR: "a part of that path is a file, not a folder: write elsewhere",
    errno.EISDIR: "that path is a folder: name a file in it",
    errno.ENAMETOOLONG: "give it a shorter name",
}


def write_atomic(path: str | os.PathLike[str], data: bytes | Callable[[BinaryIO], object]) -> None:
    """Write `data`, or what `data(stream)` writes to a binary stream, as the file `path`.

    The bytes go to a temporary file in the same folder, which is flushed to the disk and then renamed over `path`; a
    kill or a power cut at any instant leaves the old file or the new one, never a part. Where it fails the old file
    stays and the temporary one is removed; only a kill can leave one behind (see `sweep`).

    Raises TrainingError, one line that names the path and the mend, where the system refuses.
    """
    try:
        target, temporary = _places(path)
        try:
            with open(temporary, "xb") as stream:
                if callable(data):
                    data(stream)
                else:
                    stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _flush_folder(target.parent)
    except OSError as error:
        raise unwritable(path, error) from error


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise the TrainingError of `write_atomic` now where it could not write `path`: before hours of work for it."""
    try:
        _, trial = _places(path)
        trial.touch(exist_ok=False)
        trial.unlink()
    except OSError as error:
        raise unwritable(path, error) from error


def _places(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """The file that `path` means, and a temporary one beside it. Raises IsADirectoryError for a folder."""
    target = Path(os.path.realpath(path))  # a link stays a link: what it points to is replaced
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    return target, target.with_name(f".{target.name}.{secrets.token_hex(4)}{_SUFFIX}")


@contextlib.contextmanager
def locked(path: str | os.PathLike[str], wait: bool = True) -> Iterator[bool]:
    """Hold a lock on `path`, a folder or a file made for it, which the system takes back when its process ends.

    Gives True; without `wait`, False where somebody else holds it. Raises TrainingError where the system has no lock
    to give.
    """
    try:
        handle = os.open(path, os.O_RDONLY if os.path.isdir(path) else os.O_CREAT | os.O_RDWR, 0o666)
    except OSError as error:
        raise unwritable(path, error) from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        except OSError as error:
            raise unwritable(path, error) from None
        yield True
    finally:
        os.close(handle)


def sweep(folder: str | os.PathLike[str]) -> None:
    """Remove what killed writes left in `folder`. Only for a folder that nobody else is writing to."""
    for left in Path(folder).glob(f".*{_SUFFIX}"):
        left.unlink(missing_ok=True)


def unwritable(path: str | os.PathLike[str], error: OSError) -> TrainingError:
    """The line for a write to `path` that the system refused."""
    missing = error.errno == errno.ENOENT and not Path(path).parent.is_dir()  # some file systems take no new files
    mend = "create the folder first" if missing else _MENDS.get(error.errno or 0, "write elsewhere")
    return TrainingError(f"cannot write {os.fspath(path)}: {error.strerror or error}; {mend}")


def _flush_folder(folder: Path) -> None:
    """Make the rename itself survive a power cut, where the system can open a folder (Windows cannot)."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems without a flush for folders
            raise
    finally:
        os.close(handle)
