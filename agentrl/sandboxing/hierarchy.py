"""Where control groups can be made, and whose they are.

Covered: cgroup v1, v2 as root, v2 delegated to a user or a container, and none at all, when
``Hierarchy.missing`` says why. Groups of processes that have ended are found by their names and removed.
"""

from __future__ import annotations

import errno
import itertools
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from agentrl.sandbox import Limits, SandboxLost
from agentrl.sandboxing.cgroups import Group, words, write
from agentrl.sandboxing.owners import MARK, is_gone, this_process

__all__ = ["Hierarchy", "find"]

_MAIN = "agentrl-main"  # where delegated v2 puts what was in a group that is to have groups inside
_OURS = re.compile(rf"agentrl-(?P<owner>{MARK})-\d+")
_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """Where groups can be made, and what they enforce."""

    version: Literal[0, 1, 2]  # 0: nowhere
    folders: Mapping[str, Path] = field(default_factory=dict)  # by controller, that groups are made in
    enforced: Mapping[str, str] = field(default_factory=dict)  # of cpu_s, memory_mib and pids: by what means
    missing: Mapping[str, str] = field(default_factory=dict)  # of the same: why not, and what to do

    def make(self, limits: Limits, *, spare_pids: int = 0) -> Group:
        """A group of this process's with ``limits`` set, counting from now. Raises OSError, SandboxLost."""
        name = f"agentrl-{this_process()}-{next(_numbers)}"
        group = Group({what: folder / name for what, folder in self.folders.items()}, self.version)
        try:
            for folder in self.folders.values():
                (folder / name).mkdir()
            group.limit(limits, spare_pids=spare_pids)
            group.begin()
        except (OSError, SandboxLost):
            group.remove()
            raise
        return group

    def sweep(self) -> int:
        """Kill and remove the groups of owners that are gone; how many. Raises SandboxLost."""
        names: dict[str, dict[str, Path]] = {}
        for controller, folder in self.folders.items():
            for path in folder.glob("agentrl-*"):
                match = _OURS.fullmatch(path.name)
                if match and is_gone(match["owner"]):
                    names.setdefault(path.name, {})[controller] = path
        return sum(Group(folders, self.version).close() for folders in names.values())


def find(proc: Path = Path("/proc/self")) -> Hierarchy:
    """What this process can use; ``proc`` has its "mountinfo" and "cgroup".

    Where v2 is delegated, its group's processes, this one among them, are moved one level down: a group can't
    have both processes and limited groups.
    """
    v1: dict[str, Path] = {}
    v2: tuple[Path, Path] | None = None  # where it is mounted, and which group that is
    for line in (proc / "mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        root, point = (_unescaped(part) for part in before.split()[3:5])
        kind, _, options = after.split(maxsplit=2)
        if kind == "cgroup":
            v1.update(dict.fromkeys(options.split(","), Path(point)))
        elif kind == "cgroup2":
            v2 = Path(point), Path(root)
    if v1.keys() & {"memory", "pids"}:
        return _version_1(v1)
    if v2 is not None:
        return _version_2(*v2, proc / "cgroup")
    return Hierarchy(0, missing=dict.fromkeys(_MEANS, "no cgroup file system is mounted: mount cgroup2"))


_MEANS = {"cpu_s": "cpuacct", "memory_mib": "memory", "pids": "pids"}  # by which controller of v1
_HELP = "run as root, or under 'systemd-run --user --scope -p Delegate=yes'"


def _version_1(mounts: Mapping[str, Path]) -> Hierarchy:
    folders, missing = {}, {}
    for controller in (*_MEANS.values(), "freezer"):
        if controller in mounts and os.access(mounts[controller], os.W_OK | os.X_OK):
            folders[controller] = mounts[controller]
    for limit, controller in _MEANS.items():
        if controller not in mounts:
            missing[limit] = f"cgroup v1 has no {controller} controller here: mount it"
        elif controller not in folders:
            missing[limit] = f"{mounts[controller]} is not writable: {_HELP}"
    enforced = {
        limit: f"cgroup v1, {controller}" for limit, controller in _MEANS.items() if controller in folders
    }
    return Hierarchy(1 if enforced else 0, folders if enforced else {}, enforced, missing)


def _version_2(point: Path, root: Path, own: Path) -> Hierarchy:
    try:
        parent = _parent(point, root, own)
        _check_writable(parent)
        _enable(parent)
    except OSError as error:
        reason = f"cgroup v2 gives us no group ({error.strerror}: {error.filename}): {_HELP}"
        return Hierarchy(0, missing=dict.fromkeys(_MEANS, reason))
    given = words(parent / "cgroup.subtree_control")
    enforced, missing = {"cpu_s": f"cgroup v2, cpu.stat in {parent}"}, {}
    for limit in ("memory_mib", "pids"):
        controller = _MEANS[limit]
        if controller in given:
            enforced[limit] = f"cgroup v2, {controller} in {parent}"
        else:
            missing[limit] = f"cgroup v2 has no {controller} controller in {parent}: {_HELP}"
    return Hierarchy(2, {"unified": parent}, enforced, missing)


def _parent(point: Path, root: Path, own: Path) -> Path:
    """The group to make ours in: the root of all where we may, else the one that this process is in."""
    if not (point / "cgroup.events").exists() and os.access(point, os.W_OK):  # only the root has none
        return point
    line = next((line for line in own.read_text().splitlines() if line.startswith("0::")), "0::/")
    here = Path(line.removeprefix("0::"))
    if here.is_relative_to(root):  # not where the mount is of a namespace's own root
        here = Path("/") / here.relative_to(root)
    folder = Path(f"{point}{here}")
    return folder.parent if folder.name == _MAIN else folder


def _check_writable(folder: Path) -> None:
    for path in (folder, folder / "cgroup.procs", folder / "cgroup.subtree_control"):
        if not os.access(path, os.W_OK):
            raise OSError(errno.EACCES, "not writable", str(path))


def _enable(parent: Path) -> None:
    """Hand the controllers that there are down to the groups in ``parent``. Raises OSError."""
    control = parent / "cgroup.subtree_control"
    wanted = {"memory", "pids"} & {*words(parent / "cgroup.controllers")} - {*words(control)}
    order = " ".join(f"+{controller}" for controller in sorted(wanted))
    if not order:
        return
    if (parent / "cgroup.events").exists():
        _move_down(parent)
    write(control, order)


def _move_down(parent: Path) -> None:
    """Empty a group that is delegated to us, all of whose processes are ours to place."""
    (parent / _MAIN).mkdir(exist_ok=True)
    for _ in range(100):  # some may fork meanwhile
        pids = words(parent / "cgroup.procs")
        if not pids:
            return
        for pid in pids:
            with suppress(ProcessLookupError):
                write(parent / _MAIN / "cgroup.procs", pid)
    raise OSError(errno.EBUSY, "its processes fork faster than they are moved", str(parent))


def _unescaped(path: str) -> str:
    """A path of mountinfo, in which spaces and the like stand as octal."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), path)
