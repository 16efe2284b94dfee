"""Working directories of sandboxes: a file system of a given size each where this process may mount one.

Covered: the size in bytes and in files, one owner, removal at once however much is inside, and by ``sweep``
what processes that are gone left mounted. An ordinary user gets a plain folder, whose size nothing bounds.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import re
import stat
import tempfile
from pathlib import Path

from agentrl.errors import CannotWrite
from agentrl.sandboxing.beneath import remove_all
from agentrl.sandboxing.owners import MARK, is_gone, this_process

__all__ = ["WorkDir", "make_folder", "sweep"]

_NOSUID, _NODEV, _DETACH = 2, 4, 2  # MS_*, MNT_*
_BLOCK = 4096  # bytes; a file or folder counts as one at least
_numbers = itertools.count()


class WorkDir:
    """One working directory, at ``path``."""

    def __init__(self, kind: str, *, size_mib: float | None, owner: int | None) -> None:
        """``owner``: uid and gid, None for our own. Raises CannotWrite, OSError."""
        self._folder = make_folder(kind)
        self.path = self._folder / "work"
        self.path.mkdir(mode=0o700)
        self._owner = os.geteuid() if owner is None else owner
        self.is_sized = os.geteuid() == 0 and self._mount(size_mib)
        if not self.is_sized and owner is not None:
            os.chown(self.path, owner, owner)

    def remove(self) -> None:
        """With all that is inside. Idempotent."""
        _remove(self._folder)

    def _mount(self, size_mib: float | None) -> bool:
        size = 0 if size_mib is None else max(int(size_mib * 2**20), _BLOCK)  # 0: no bound
        files = size // _BLOCK + 16 if size else 0
        options = f"size={size},nr_inodes={files},mode=0700,uid={self._owner},gid={self._owner}".encode()
        path, flags = os.fsencode(self.path), ctypes.c_ulong(_NOSUID | _NODEV)
        done: int = _libc().mount(b"agentrl", path, b"tmpfs", flags, options)
        return done == 0


def make_folder(kind: str) -> Path:
    """A folder of this process's, which others may pass through. Raises CannotWrite, OSError."""
    folder = _base() / f"{kind}-{this_process()}-{next(_numbers)}"
    folder.mkdir()
    folder.chmod(0o711)  # whatever the umask
    return folder


def sweep(kind: str) -> int:
    """Remove what processes that are gone left; how many folders."""
    pattern = re.compile(rf"{kind}-(?P<owner>{MARK})-\d+")
    swept = 0
    for folder in _base().iterdir():
        match = pattern.fullmatch(folder.name)
        if match and is_gone(match["owner"]):
            _remove(folder)
            swept += 1
    return swept


def _base() -> Path:
    """The folder of all of them, ours alone to write. Raises CannotWrite."""
    path = Path("/run/agentrl")
    if not os.access("/run", os.W_OK):
        path = Path(tempfile.gettempdir()) / f"agentrl-{os.geteuid()}"
    path.mkdir(mode=0o711, exist_ok=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise CannotWrite(f"{path} is not a folder that only this user may write: remove it")
    path.chmod(0o711)
    return path


def _remove(folder: Path) -> None:
    if os.geteuid() == 0:
        while _libc().umount2(os.fsencode(folder / "work"), _DETACH) == 0:
            continue
    remove_all(folder)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
