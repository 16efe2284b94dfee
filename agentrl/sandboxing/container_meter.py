"""What a container has used: from its cgroup's files, or from an engine that runs elsewhere.

``HostMeter`` reads cgroup v1 and v2, as any user may. ``EngineMeter`` asks the engine for its statistics
while a command runs, so its CPU clock is up to half a second late.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from agentrl.sandbox import SandboxLost

__all__ = ["EngineMeter", "HostMeter", "Meter", "Usage", "host_meter"]

_BUFFERS = 16 << 20  # bytes in the buffers of a container's IP sockets
_CGROUPS = Path("/sys/fs/cgroup")
_SAMPLE_S = 0.2


@dataclass(frozen=True, slots=True)
class Usage:
    """Of all that ran in the container so far."""

    cpu_s: float
    peak_bytes: int  # 0 where it can't be read
    memory_kills: int  # by the kernel, because the limit of memory was reached
    pids_hits: int  # attempts at one process more than allowed


class Meter(Protocol):
    """Reads one container."""

    def cpu_s(self) -> float:
        """CPU seconds so far; cheap."""
        ...

    def usage(self) -> Usage:
        """All of it, once the command is over. Raises SandboxLost."""
        ...

    @contextmanager
    def watching(self) -> Iterator[Usage]:
        """While a command runs and ``cpu_s`` must move; yields what was used before.

        The peak is of this time where the kernel allows.
        """
        ...


@dataclass(frozen=True, slots=True)
class HostMeter:
    """Files under /sys/fs/cgroup; one that is gone reads as nothing."""

    cpu: Path  # nanoseconds in v1, cpu.stat in v2
    peak: Path
    kills: Path  # a file with a line "oom_kill N"
    hits: Path  # a file with a line "max N"

    def cpu_s(self) -> float:
        """See :class:`Meter`."""
        if self.cpu.name == "cpu.stat":
            return _entry(self.cpu, "usage_usec") / 1e6
        return _whole(self.cpu) / 1e9

    def usage(self) -> Usage:
        """See :class:`Meter`."""
        return Usage(
            self.cpu_s(), _whole(self.peak), _entry(self.kills, "oom_kill"), _entry(self.hits, "max")
        )

    @contextmanager
    def watching(self) -> Iterator[Usage]:
        """See :class:`Meter`."""
        if self.peak.name != "memory.peak":
            with suppress(OSError):  # only root may
                self.peak.write_text("0")
        yield self.usage()


def host_meter(pid: int, container: str) -> HostMeter | None:
    """The meter of a container whose first process is ``pid``, its sockets' buffers bounded; None where that
    is no process of this host."""
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    except OSError:
        return None
    # The path has the container's id, unless the engine's numbers of processes are of another machine.
    places = {
        controller: path.lstrip("/")
        for _, controllers, path in (line.split(":", 2) for line in lines)
        for controller in controllers.split(",")
        if container in path
    }
    if {"memory", "cpuacct", "pids"} <= set(places):
        folders = {name: _CGROUPS / name / places[name] for name in ("memory", "cpuacct", "pids")}
        # No engine offers this limit of v1's, to whose memory the buffers of IP sockets are not charged.
        with suppress(OSError):  # only root may
            (folders["memory"] / "memory.kmem.tcp.limit_in_bytes").write_text(str(_BUFFERS))
        meter = HostMeter(
            cpu=folders["cpuacct"] / "cpuacct.usage",
            peak=folders["memory"] / "memory.max_usage_in_bytes",
            kills=folders["memory"] / "memory.oom_control",
            hits=folders["pids"] / "pids.events",
        )
    elif "" in places:
        folder = _CGROUPS / places[""]
        meter = HostMeter(
            cpu=folder / "cpu.stat",
            peak=folder / "memory.peak",
            kills=folder / "memory.events",
            hits=folder / "pids.events",
        )
    else:
        return None
    return meter if meter.cpu.exists() and meter.kills.exists() else None


def _whole(path: Path) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return 0


def _entry(path: Path, key: str) -> int:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.split()[0] == key), 0)


class EngineMeter:
    """The engine's statistics and events."""

    def __init__(self, statistics: Callable[[], Mapping[str, Any]], memory_kills: Callable[[], int]) -> None:
        self._statistics, self._memory_kills = statistics, memory_kills
        self._cpu_s = 0.0
        self._last = Usage(0.0, 0, 0, 0)

    def cpu_s(self) -> float:
        """See :class:`Meter`."""
        return self._cpu_s

    def usage(self) -> Usage:
        """See :class:`Meter`."""
        found = self._sample()
        peak = int(found.get("memory_stats", {}).get("max_usage", 0))  # in cgroup v1 only
        self._last = Usage(self._cpu_s, peak, self._memory_kills(), 0)
        return self._last

    @contextmanager
    def watching(self) -> Iterator[Usage]:
        """See :class:`Meter`."""
        over = threading.Event()
        thread = threading.Thread(target=self._watch, args=(over,), name="agentrl-docker-statistics")
        thread.start()
        try:
            yield self._last
        finally:
            over.set()
            thread.join()

    def _watch(self, over: threading.Event) -> None:
        while not over.wait(_SAMPLE_S):
            with suppress(SandboxLost):  # who holds the conversation learns of it himself
                self._sample()

    def _sample(self) -> Mapping[str, Any]:
        found = self._statistics()
        used = found.get("cpu_stats", {}).get("cpu_usage", {}).get("total_usage", 0) / 1e9
        self._cpu_s = max(self._cpu_s, used)  # of a container that is gone: 0
        return found
