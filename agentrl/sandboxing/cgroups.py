"""A control group per sandbox: memory and processes limited, CPU time summed, all killed from outside.

Covered: cgroup v1 (memory, pids, cpuacct, freezer), v2, and none at all, when a group does nothing. Where
groups can be made is ``agentrl.sandboxing.hierarchy``'s. Not covered: limiting the speed of CPU or disk.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from agentrl.sandbox import Limits, SandboxLost
from agentrl.sandboxing.owners import is_running

__all__ = ["Group", "expose", "words", "write"]

_KILL_S = 10.0  # at most, from the signal until none is left
_WAIT_S = 0.001  # between two looks
_BUFFERS = 16 << 20  # bytes in the buffers of a v1 group's IP sockets
_PLAIN = 3  # kills without stopping first; enough where pid 1 of a namespace is among them


def expose(pid: int) -> None:
    """Have the kernel kill a process, and its children, before others where the machine lacks memory."""
    write(Path(f"/proc/{pid}/oom_score_adj"), "1000")


@dataclass(frozen=True, slots=True)
class _Count:
    """Where a number stands: its file, and the word before it where the file has several."""

    controller: str
    file: str
    word: str = ""


@dataclass(frozen=True, slots=True)
class _Layout:
    """What a version of cgroups calls things."""

    cpu: _Count
    cpu_per_s: float
    peak: _Count
    oom_kills: _Count
    pids_hit: _Count


_LAYOUTS = {
    1: _Layout(
        cpu=_Count("cpuacct", "cpuacct.usage"),
        cpu_per_s=1e9,
        peak=_Count("memory", "memory.max_usage_in_bytes"),
        oom_kills=_Count("memory", "memory.oom_control", "oom_kill"),
        pids_hit=_Count("pids", "pids.events", "max"),
    ),
    2: _Layout(
        cpu=_Count("unified", "cpu.stat", "usage_usec"),
        cpu_per_s=1e6,
        peak=_Count("unified", "memory.peak"),
        oom_kills=_Count("unified", "memory.events", "oom_kill"),
        pids_hit=_Count("unified", "pids.events", "max"),
    ),
}


class Group:
    """The processes of one sandbox, run after run; a group of no hierarchy holds and does nothing."""

    def __init__(self, folders: Mapping[str, Path], version: Literal[0, 1, 2]) -> None:
        self._folders = folders  # by controller; of v2 one, "unified"
        self._version = version
        self._layout = _LAYOUTS.get(version)
        self._before: dict[_Count, int] = {}  # when the run began
        self._limits: tuple[int, str] | None = None  # memory and pids as they are set
        self._open: dict[
            tuple[str, str], int
        ] = {}  # by controller and file; v2's peak is reset by descriptor

    @property
    def procs(self) -> tuple[Path, ...]:
        """Files into each of which a process of one thread writes "0", or somebody its pid, to enter.

        With v1, a thread that moves itself does not wait, where any other move takes some 10 ms: the kernel
        waits until no process is forking (since 6.1, ``cgroup_procs_write_start``).
        """
        name = "tasks" if self._version == 1 else "cgroup.procs"
        return tuple(folder / name for folder in self._folders.values())

    def enter(self, pid: int) -> None:
        """Put a process of one thread in, its children first in line when memory runs out.

        Before it runs anything: what it has by then is counted elsewhere. Raises OSError.
        """
        for path in self.procs:
            write(path, str(pid))
        expose(pid)

    def limit(self, limits: Limits, *, spare_pids: int = 0) -> bool:
        """Enforce memory and pids; ``spare_pids``: processes of the launcher's own, inside as well.

        False where files in memory, say, are more than that; the next call then sets all. Raises SandboxLost.
        """
        most = -1 if limits.memory_mib is None else int(limits.memory_mib * 2**20)
        pids = "max" if limits.pids is None else str(int(limits.pids) + spare_pids)
        if (most, pids) == self._limits:
            return True
        self._limits = None  # what stands half set is set again by the next
        try:
            self._limit(most, pids)
        except OSError as error:
            if error.errno == errno.EBUSY:
                return False
            raise SandboxLost(f"the limits of a sandbox can't be set: {error}") from error
        self._limits = (most, pids)
        return True

    def _limit(self, most: int, pids: str) -> None:
        """``most``: bytes, -1 for no limit; first, because what is there can only speak against it."""
        if self._version == 1:
            if "memory" in self._folders:
                _limit_memory_v1(self._folders["memory"], most)
            if "pids" in self._folders:
                write(self._folders["pids"] / "pids.max", pids)
        elif self._version == 2:
            folder = self._folders["unified"]
            bytes_ = "max" if most < 0 else str(most)
            swap = "max" if most < 0 else "0"
            for name, text in (("memory.max", bytes_), ("memory.swap.max", swap), ("pids.max", pids)):
                if (folder / name).exists():  # else this host can't enforce it, as ``missing`` said
                    write(folder / name, text)

    def begin(self) -> None:
        """Count anew from here: a run begins."""
        if self._layout is None:
            return
        for count in (self._layout.cpu, self._layout.oom_kills, self._layout.pids_hit):
            self._before[count] = self._read(count)
        with suppress(OSError):  # before 6.12, v2 can't; the peak is then of all runs
            os.pwrite(self._descriptor(self._layout.peak.controller, self._layout.peak.file), b"0", 0)

    def cpu_s(self) -> float:
        """CPU seconds of all processes since ``begin``."""
        return self._since(self._layout.cpu) / self._layout.cpu_per_s if self._layout else 0.0

    def oom_kills(self) -> int:
        """Processes killed for want of memory since ``begin``."""
        return self._since(self._layout.oom_kills) if self._layout else 0

    def pids_hit(self) -> int:
        """Forks refused at the limit since ``begin``."""
        return self._since(self._layout.pids_hit) if self._layout else 0

    def peak_bytes(self) -> int:
        """Most memory at once since ``begin``, files in memory included; 0 where it can't be read."""
        return self._read(self._layout.peak) if self._layout else 0

    def pids(self) -> list[int]:
        """Of the processes inside that have not ended; none only if there is none."""
        listed = self._listed()
        while True:
            running = [pid for pid in listed if is_running(pid)]
            if running or not listed:
                return running
            # One may have been forked behind the list by another that has ended since.
            again = self._listed()
            if {*again} <= {*listed}:
                return []
            listed = again

    def _listed(self) -> list[int]:
        for controller in ("unified", "freezer", "pids", "memory", "cpuacct"):
            if controller in self._folders:
                try:
                    # Opened anew: v1 says the same for a second to who reads again without.
                    return [int(pid) for pid in words(self._folders[controller] / "cgroup.procs")]
                except OSError as error:
                    _check_gone(error)
        return []

    def kill(self) -> None:
        """Kill every process inside, those included that are being forked; returns when none is left.

        From any thread. Raises SandboxLost where some won't die, as in a disk's or a network's wait.
        """
        until = time.monotonic() + _KILL_S
        looks = 0
        while pids := self.pids():
            if os.getpid() in pids:
                raise SandboxLost("a sandbox's group holds the process that is to kill it")
            if time.monotonic() > until:
                raise SandboxLost(f"processes {pids[:5]} of a sandbox can't be killed: the kernel holds them")
            looks += 1
            if not self._kill_at_once():
                self._kill_each(frozen=looks > _PLAIN)
            time.sleep(_WAIT_S)

    def remove(self) -> bool:
        """Remove an empty group; whether it is gone. Idempotent."""
        while self._open:
            os.close(self._open.popitem()[1])
        gone = [_remove(folder) for folder in self._folders.values()]
        return all(gone)

    def close(self) -> bool:
        """Kill, then remove."""
        self.kill()
        return self.remove()

    def _kill_at_once(self) -> bool:
        """Through cgroup.kill, which v2 has since 5.14."""
        if "unified" not in self._folders:
            return False
        try:
            write(self._folders["unified"] / "cgroup.kill", "1")
        except OSError:
            return False
        return True

    def _kill_each(self, *, frozen: bool) -> None:
        """One by one; ``frozen``: stopped meanwhile, so that none forks behind our back."""
        state = self._folders["freezer"] / "freezer.state" if "freezer" in self._folders else None
        on, off = "FROZEN", "THAWED"
        if "unified" in self._folders:
            state, on, off = self._folders["unified"] / "cgroup.freeze", "1", "0"
        if frozen and state:
            with suppress(OSError):
                write(state, on)
        for pid in self.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if frozen and state:
            with suppress(OSError):
                write(state, off)

    def _since(self, count: _Count) -> int:
        return self._read(count) - self._before.get(count, 0)

    def _read(self, count: _Count) -> int:
        if count.controller not in self._folders:
            return 0
        try:
            words = self._content(count.controller, count.file).split()
        except OSError as error:  # an older kernel has none, or the group is removed
            _check_gone(error)
            return 0
        if count.word:
            word = count.word.encode()
            words = words[words.index(word) + 1 :] if word in words else [b"0"]
        return int(words[0])

    def _content(self, controller: str, file: str) -> bytes:
        """Of one of its files, which stays open: they are read often. Raises OSError."""
        descriptor = self._descriptor(controller, file)
        data = b""
        while more := os.pread(descriptor, 1 << 16, len(data)):
            data += more
        return data

    def _descriptor(self, controller: str, file: str) -> int:
        if (controller, file) not in self._open:
            path = self._folders[controller] / file
            with suppress(PermissionError):
                self._open[controller, file] = os.open(path, os.O_RDWR | os.O_CLOEXEC)
                return self._open[controller, file]
            self._open[controller, file] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return self._open[controller, file]


def _check_gone(error: OSError) -> None:
    """Raises SandboxLost for what is not the end of a group's files: too many open files, say."""
    if error.errno not in (errno.ENOENT, errno.ENODEV):
        raise SandboxLost(f"a sandbox's control group can't be read: {error}") from error


def _limit_memory_v1(folder: Path, most: int) -> None:
    """Memory; the buffers of IP sockets, which are not charged to it; memory with swap, which may at no time
    be less than memory alone."""
    buffers = folder / "memory.kmem.tcp.limit_in_bytes"
    if buffers.exists():  # a kernel without IP, or without this part of v1, has none
        write(buffers, str(min(most, _BUFFERS) if most >= 0 else -1))
    limit, both = folder / "memory.limit_in_bytes", folder / "memory.memsw.limit_in_bytes"
    if not both.exists():
        write(limit, str(most))
        with suppress(OSError):
            write(folder / "memory.swappiness", "0" if most >= 0 else "60")
        return
    try:
        write(limit, str(most))
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        write(both, str(most))
        write(limit, str(most))
    write(both, str(most))


def _remove(folder: Path) -> bool:
    """Whether a group's folder is gone; on a busy machine, the dead take a while to leave it."""
    until = time.monotonic() + _KILL_S
    while True:
        try:
            folder.rmdir()
        except FileNotFoundError:
            return True
        except OSError:
            if time.monotonic() > until:
                return False
            time.sleep(_WAIT_S)


def words(path: Path) -> list[str]:
    """What a file of a control group says."""
    return path.read_text().split()


def write(path: Path, text: str) -> None:
    """In one write, as the kernel wants it."""
    file = os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC)
    try:
        os.write(file, text.encode())
    finally:
        os.close(file)
