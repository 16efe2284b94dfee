"""Files and folders that are there whole or not at all, and a disk that refuses them as one clear error.

What is written stands under a name ending in ``.partial`` until it is flushed to the disk and renamed, so a
kill or a crash at any instant leaves the old one, the new one, or a name that nothing reads.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from agentrl.errors import CannotWrite

__all__ = ["PARTIAL", "remove_folder", "write_folder", "write_text", "writing"]

PARTIAL = ".partial"  # ends the name of what is being written or removed


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises CannotWrite for an OSError in the block, which writes ``path``."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise CannotWrite(
            f"{path} could not be written: {reason}. Its folder must be one that may be written to, with "
            "space left; what was saved before is untouched. Make room, then repeat the command, a run's "
            "with --resume"
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write a file, flushed, whole or not at all. Raises CannotWrite."""
    partial = path.with_name(path.name + PARTIAL)
    with writing(path):
        try:
            with partial.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
            _flush(path.parent)
        except OSError:
            partial.unlink(missing_ok=True)
            raise


def write_folder(path: Path, write: Callable[[Path], object]) -> None:
    """Have ``write(folder)`` fill a folder that then becomes ``path``, flushed, whole or not at all.

    Raises CannotWrite for an OSError; what had been written is removed, so that a full disk has room again.
    """
    partial = path.with_name(path.name + PARTIAL)
    with writing(path):
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            write(partial)
            for file in (*partial.rglob("*"), partial):
                _flush(file)
        except OSError:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        remove_folder(path)
        partial.rename(path)
        _flush(path.parent)


def remove_folder(path: Path) -> None:
    """Remove ``path`` if it is there; a kill leaves it whole or under a name that nothing reads."""
    if not path.exists():
        return
    leaving = path if path.suffix == PARTIAL else path.with_name(f"{path.name}.old{PARTIAL}")
    if leaving != path:
        shutil.rmtree(leaving, ignore_errors=True)
        path.rename(leaving)
    shutil.rmtree(leaving)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
