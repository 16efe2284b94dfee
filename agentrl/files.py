"""Files and folders that are there whole or not at all, and a disk that refuses them as one clear error.

What is written stands under a name ending in ``.partial`` until it is flushed to the disk and renamed, so a
kill or a crash at any instant leaves the old one, the new one, or a name that nothing reads.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from agentrl.errors import BadConfig, CannotWrite

__all__ = [
    "PARTIAL",
    "check_output",
    "check_writable",
    "remove_folder",
    "write_folder",
    "write_json",
    "write_text",
    "writing",
]

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


def check_writable(folder: Path, *, key: str) -> None:
    """Raises BadConfig where nothing can be written in ``folder``, which need not exist; ``key`` is what sets
    it."""
    nearest = folder.absolute()
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise BadConfig(
            f"can't write in {folder}: {nearest}: {error.strerror}; "
            f"set {key} to a folder that you may write in"
        ) from None


def check_output(file: Path | None, *, key: str) -> None:
    """Raises BadConfig where ``file`` can't be written, which need not exist; ``key`` is what names it."""
    if file is None:
        return
    if file.is_dir():
        raise BadConfig(f"{key} names {file}, a folder: name a file, like {file / 'report.json'}")
    if not file.exists():  # what is there may be written where its folder may not, like /dev/stdout
        check_writable(file.parent, key=key)
    elif not os.access(file, os.W_OK):
        raise BadConfig(f"can't write {file}: set {key} to a file that you may write")


def write_json(path: Path, value: Any) -> None:
    """Write a report, which may be a pipe, its folder made. Raises CannotWrite."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


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
