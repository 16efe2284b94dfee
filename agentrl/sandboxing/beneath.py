"""Reading and writing in a folder whose contents somebody hostile has arranged.

No link is followed, on no part of the way; only regular files are read, up to a size. Each folder is opened
in turn without following links, so that swapping one for a link in between changes nothing.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from agentrl.sandbox import check_path

__all__ = ["read_beneath", "write_beneath"]

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def read_beneath(folder: Path, path: str, *, most_bytes: int) -> bytes:
    """The regular file ``path``. Raises FileNotFoundError for anything else, OSError(EFBIG) for a big one."""
    try:
        with _parent(folder, path, make=False) as (parent, name):
            # O_NONBLOCK: opening a named pipe must not wait for a writer.
            file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=parent)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.ENXIO, errno.EISDIR):
            raise FileNotFoundError(errno.ENOENT, "no regular file", path) from None
        raise
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise FileNotFoundError(errno.ENOENT, "no regular file", path)
    with open(file, "rb") as opened:
        data = opened.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise OSError(errno.EFBIG, f"more than {most_bytes} bytes", path)
    return data


def write_beneath(folder: Path, path: str, data: bytes, *, owner: int | None = None) -> None:
    """Write ``path`` anew, its folders made; ``owner``: the uid and gid that they get."""
    with _parent(folder, path, make=True, owner=owner) as (parent, name):
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with suppress(FileNotFoundError):  # a link, a pipe, a file with another name as well: gone first
            os.unlink(name, dir_fd=parent)
        file = os.open(name, flags, 0o644, dir_fd=parent)
        with open(file, "wb", closefd=True) as opened:
            opened.write(data)
            if owner is not None:
                os.fchown(file, owner, owner)


@contextmanager
def _parent(folder: Path, path: str, *, make: bool, owner: int | None = None) -> Iterator[tuple[int, str]]:
    """A descriptor of the folder that ``path`` lies in, and its name there."""
    *folders, name = check_path(path).parts
    here = os.open(folder, _FOLDER)
    try:
        for part in folders:
            if make:
                with suppress(FileExistsError):
                    os.mkdir(part, 0o755, dir_fd=here)
                    if owner is not None:
                        os.chown(part, owner, owner, dir_fd=here, follow_symlinks=False)
            inner = os.open(part, _FOLDER, dir_fd=here)
            os.close(here)
            here = inner
        yield here, name
    finally:
        os.close(here)
