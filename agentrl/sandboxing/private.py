"""Which folders of this host no run may see, even where they lie in what all runs see.

Installed for the whole system, or checked out below /usr, this library, environments and data sets lie beside
the interpreter, and with them hidden tests, right solutions and a user's own files.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from importlib.metadata import entry_points
from importlib.util import find_spec

__all__ = ["hidden_in", "keep_private", "private_folders"]

_LIBRARY = __name__.partition(".")[0]
_GROUPS = ("agentrl.environments", "agentrl.rewards")
_SYSTEM = ("bin", "sbin", "lib", "lib64", "libexec", "include", "share")  # of /usr and of /usr/local
_kept: set[str] = set()


def keep_private(*folders: str | os.PathLike[str]) -> None:
    """Hide these too: where a data set was found, or what was loaded by its name. Backends hide what is known
    when their first session opens, so make the environment before."""
    _kept.update(os.path.realpath(folder) for folder in folders)


def private_folders() -> tuple[str, ...]:
    """Real paths: this library's, those of packages with environments or rewards, what is kept private, the
    working directory.

    Left out is what holds a part of the system or the interpreter, such as a working directory /usr, and what
    lies within another one.
    """
    found = {os.path.realpath(folder) for folder in (*sys.modules[_LIBRARY].__path__, *_packages(), *_kept)}
    with suppress(FileNotFoundError):  # it was removed
        found.add(os.getcwd())
    needed = {os.path.realpath(path) for path in _needed()}
    hidden = [folder for folder in found if not any(_is_in(path, folder) for path in needed)]
    return tuple(
        sorted(
            path for path in hidden if not any(_is_in(path, folder) for folder in hidden if folder != path)
        )
    )


def hidden_in(shown: Mapping[str, str], private: Iterable[str]) -> list[str]:
    """Where ``private`` folders would be seen; ``shown``: real paths of the host, and where each is seen."""
    return [
        seen + folder[len(real) :]
        for folder in private
        for real, seen in shown.items()
        if folder != real and _is_in(folder, real)
    ]


def _packages() -> Iterator[str]:
    for group in _GROUPS:
        for point in entry_points(group=group):
            spec = None
            with suppress(ImportError, ValueError):
                spec = find_spec(point.value.partition(":")[0].partition(".")[0])
            if spec is not None:
                yield from spec.submodule_search_locations or ()


def _needed() -> Iterator[str]:
    yield from (sys.base_prefix, os.path.dirname(os.__file__))
    yield f"/usr/lib/{getattr(sys.implementation, '_multiarch', '')}"
    for prefix in ("/usr", "/usr/local"):
        yield from (f"{prefix}/{name}" for name in _SYSTEM)


def _is_in(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")
