"""Reading, writing and removing in a folder whose contents somebody hostile has arranged.

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

from agentrl.sandbox import SandboxLost, check_path

__all__ = ["read_beneath", "remove_all", "unlock", "write_beneath"]

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@contextmanager
def _room() -> Iterator[None]:
    """That this process has too many open files is nobody's doing inside. Raises SandboxLost."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise SandboxLost(f"a sandbox's file can't be opened: {error}") from error
        raise


def unlock(folder: Path) -> None:
    """Let its owner into a folder whose mode the code inside has changed. Raises SandboxLost."""
    try:
        os.chmod(folder, 0o700)
    except OSError as error:
        raise SandboxLost(f"a working directory is gone: {error}") from error


@_room()
def read_beneath(folder: Path, path: str, *, most_bytes: int) -> bytes:
    """The regular file ``path``. Raises FileNotFoundError for anything else, OSError(EFBIG) for a big one."""
    try:
        with _parent(folder, path, make=False) as (parent, name):
            # O_NONBLOCK: opening a named pipe must not wait for a writer.
            file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=parent)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.ENXIO, errno.EISDIR, errno.EACCES):
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


@_room()
def write_beneath(folder: Path, path: str, data: bytes, *, owner: int | None = None) -> None:
    """Write ``path`` anew, its folders made; ``owner``: the uid and gid that they get.

    Who could execute the file that was there can execute the new one.
    """
    with _parent(folder, path, make=True, owner=owner) as (parent, name):
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        mode = 0o644
        with suppress(FileNotFoundError):  # a link, a pipe, a file with another name as well: gone first
            old = os.lstat(name, dir_fd=parent).st_mode
            os.unlink(name, dir_fd=parent)
            mode |= old & 0o111 if stat.S_ISREG(old) else 0
        file = os.open(name, flags, mode, dir_fd=parent)
        with open(file, "wb", closefd=True) as opened:
            opened.write(data)
            if owner is not None:
                os.fchown(file, owner, owner)


def remove_all(folder: Path) -> None:
    """Remove a folder with all that is inside, however deep and whatever its modes.

    Folders are moved up before they are emptied: no path grows long, and nothing recurses. Where another
    process removes the same, both get on; what the kernel refuses is left.
    """
    with suppress(OSError):
        top = os.open(folder, _FOLDER)
        try:
            while names := os.listdir(top):
                for name in names:
                    with suppress(FileNotFoundError):
                        _remove_one(name, top)
        finally:
            os.close(top)
        os.rmdir(folder)


def _remove_one(name: str, top: int) -> None:
    """What has that name in ``top``; the folders in it move there."""
    if not stat.S_ISDIR(os.lstat(name, dir_fd=top).st_mode):
        os.unlink(name, dir_fd=top)
        return
    here = _unlocked(name, top)
    try:
        with os.scandir(here) as entries:
            inside = list(entries)
        for entry in inside:
            with suppress(FileNotFoundError):
                if entry.is_dir(follow_symlinks=False):
                    os.close(_unlocked(entry.name, here))  # to be moved, a folder must be writable, too
                    os.rename(entry.name, os.urandom(16).hex(), src_dir_fd=here, dst_dir_fd=top)
                else:
                    os.unlink(entry.name, dir_fd=here)
    finally:
        os.close(here)
    os.rmdir(name, dir_fd=top)


def _unlocked(name: str, parent: int) -> int:
    """A descriptor of a folder, once its owner may do everything there."""
    found = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    try:
        os.chmod(f"/proc/self/fd/{found}", 0o700)
        return os.open(f"/proc/self/fd/{found}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    finally:
        os.close(found)


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
