"""The seam to untrusted code: a command in, what became of it out; and what a backend must say of itself.

A backend opens sandboxes. A sandbox is a session: files in its working directory persist from one ``run`` to
the next until it is closed; processes do not, none of a run's outlives it. Whatever mode the code gives that
directory, the next run, ``read`` and ``write`` enter it. A result has a status and a fault, never a verdict:
that is the judge's (``agentrl.judge``).

Two rules bind every backend. It enforces each limit that it is given and every guarantee that it claims, or
it refuses to open: nothing degrades silently. A limit that is None is not asked for. And whatever it leaves
behind when its process is killed, ``sweep`` of a later process finds and removes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import PurePosixPath
from typing import Literal, Protocol, get_args

from agentrl.errors import BadConfig, WorldError

__all__ = [
    "GUARANTEES",
    "LIMITS",
    "Backend",
    "Channel",
    "ExecResult",
    "Fault",
    "Gone",
    "Limits",
    "Sandbox",
    "SandboxLost",
    "Status",
    "Survey",
    "Talk",
    "check_enforced",
    "check_command",
    "check_path",
    "lowered",
]

# ok: exit code 0; error: another one; signal: killed by one that nobody here sent. Then the limits, and lost:
# ended by the world (killed from outside, the engine went away).
Status = Literal["ok", "error", "signal", "cpu", "wall", "memory", "output", "lost"]
Fault = Literal["none", "policy", "world"]

# What a backend may guarantee beside the limits, each with what the code inside then can't do.
GUARANTEES: Mapping[str, str] = {
    "files": "see or change a file of the host, its sockets included",
    "processes": "see, signal or trace a process of the host or of another run",
    "privileges": "gain a capability, or another user's rights",
    "network": "reach anything over a network, the host's own services included",
    "environment": "read the environment variables or the memory of the host's processes",
    "survivors": "leave a process behind when its run is over",
}
LIMITS = ("cpu_s", "wall_s", "memory_mib", "pids", "disk_mib", "output_kib")
_MOST_PIDS = 1 << 22  # that Linux has (PID_MAX_LIMIT)
_MOST_PATH = 200  # characters of a file's name, with its folders


class SandboxLost(WorldError):
    """A sandbox could not be made, or went away while nobody inside was to blame."""

    boundary = "sandbox"


class Gone(Exception):
    """The other end of a channel closed, or its command went over a limit: the run is over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one command may use, summed over its processes. None: not limited."""

    cpu_s: float | None = 10.0  # CPU seconds
    wall_s: float | None = 30.0  # seconds from its start; a guard, since waiting costs no CPU time
    memory_mib: int | None = 512  # resident, files in memory included; address space is free
    pids: int | None = 64  # processes and threads at once
    disk_mib: int | None = 64  # of the working directory, and of the temporary one
    output_kib: int | None = (
        64  # kept of stdout and of stderr each, head and tail; sixteen times that ends it
    )
    network: bool = False

    def __post_init__(self) -> None:
        for name in LIMITS:
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e9:
                raise BadConfig(
                    f"Limits({name}={value!r}): it is a number above 0 and below 1e9, or None for no limit"
                )
            if name == "pids" and (value != int(value) or value > _MOST_PIDS):
                raise BadConfig(
                    f"Limits(pids={value!r}): it is a whole number up to {_MOST_PIDS}, or None for no limit"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecResult:
    """What became of a command."""

    status: Status
    fault: Fault  # policy: a limit, a signal, or an exit code other than 0; world: status lost
    exit_code: int | None = None  # None where a signal or a limit ended it
    signal: int | None = None  # that ended it, a limit's own SIGKILL included
    stdout: bytes = b""  # head and tail, where it was more than kept; b"" where a Talk read it
    stderr: bytes = b""
    truncated: int = 0  # bytes of both that were dropped
    cpu_ms: float = 0.0  # of all its processes
    wall_ms: float = 0.0  # from its start to its end
    queue_ms: float = 0.0  # before that: waiting for a core, a container, a fork
    peak_bytes: int = 0  # most memory at once; 0 where it can't be read
    flags: tuple[str, ...] = ()  # telemetry of what looked like an attack, such as "pids_hit"

    def __post_init__(self) -> None:
        assert self.status in get_args(Status)
        assert (self.fault == "world") == (self.status == "lost")
        assert (self.fault == "none") == (self.status == "ok")


class Channel(Protocol):
    """The host's end of a running command's stdin and stdout."""

    def send(self, data: bytes) -> None:
        """Write all of ``data``. Raises Gone."""
        ...

    def receive(self, most: int) -> bytes:
        """At least one byte and at most ``most``, as soon as there are any. Raises Gone at the end."""
        ...


# A conversation with a running command, in the caller's thread; the run is over when it returns, and then
# every process is killed that is still there. What it raises, Gone excepted, comes out of ``run``.
Talk = Callable[[Channel], None]


class Sandbox(Protocol):
    """One session. ``close`` may come from any thread and ends a run in progress; ``run`` one at a time."""

    def run(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes | Talk = b"",
        files: Mapping[str, bytes] | None = None,
        limits: Limits | None = None,
    ) -> ExecResult:
        """Run ``argv`` in the working directory, with ``files`` written there first; blocks until it is over.

        The environment is empty but for PATH, HOME, LANG and TMPDIR. stdin is closed behind its bytes.
        ``limits`` may only be lower than those the sandbox was opened with, whose disk and network are all of
        its runs'; None: the same. Every process of the run is dead when this returns. Raises BadConfig for a
        bad name or limit, SandboxLost.

        What the code inside or the command's words bring about is not raised but the policy's error: exit
        code 126 where a file can't be written for what lies there or for lack of room, 127 where a word is
        none that a program can be given (it has a NUL, or half of a character).
        """
        ...

    def read(self, path: str, *, most_bytes: int = 1 << 20) -> bytes:
        """A regular file of the working directory, no link on the way followed.

        Raises FileNotFoundError for what is none, OSError(EFBIG) for more than ``most_bytes``, SandboxLost.
        """
        ...

    def write(self, path: str, data: bytes) -> None:
        """Write a file, its folders made, no link followed; one that was executable stays so.

        Raises BadConfig, SandboxLost; OSError where what lies there, or how much, forbids it: the code's own
        doing, which a tool tells the model.
        """
        ...

    def close(self) -> None:
        """Kill what runs and remove what there is. Idempotent."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """What a backend can do on this host."""

    available: bool
    enforced: Mapping[str, str] = field(default_factory=dict)  # of LIMITS and GUARANTEES: by what means
    missing: Mapping[str, str] = field(default_factory=dict)  # of the same: why not, and what to install
    note: str = ""  # why it is not available, or its version

    def __post_init__(self) -> None:
        known = {*LIMITS, *GUARANTEES}
        assert not self.available or {*self.enforced, *self.missing} == known
        assert not {*self.enforced} & {*self.missing}


class Backend(Protocol):
    """A way to make sandboxes. Safe to use from many threads."""

    name: str

    def survey(self) -> Survey:
        """What it enforces here; cheap after the first call."""
        ...

    def open(self, limits: Limits) -> Sandbox:
        """A fresh session. Raises BadConfig where ``limits`` can't be enforced here, SandboxLost."""
        ...

    def sweep(self) -> int:
        """Remove what processes that are gone left behind; how many things. Done before the first open."""
        ...

    def close(self) -> None:
        """Close every sandbox and whatever is kept ready. Idempotent."""
        ...


def check_enforced(name: str, survey: Survey, limits: Limits, *, trusted: bool = False) -> None:
    """Raise BadConfig unless backend ``name`` enforces all that is asked for.

    ``trusted``: the code is, so that no guarantee is asked for, only the limits that are not None.
    """
    if not survey.available:
        raise BadConfig(f"the sandbox {name!r} is not available here: {survey.note}")
    wanted = [limit for limit in LIMITS if getattr(limits, limit) is not None]
    if not trusted:
        wanted += [promise for promise in GUARANTEES if promise != "network" or not limits.network]
    lacking = [what for what in wanted if what not in survey.enforced]
    if lacking:
        what = lacking[0]
        way = f"set {what}=None to do without" if what in LIMITS else "choose another backend"
        raise BadConfig(
            f"the sandbox {name!r} can't enforce {what} here: {survey.missing.get(what, 'unknown')}; {way}, "
            "or see 'agentrl sandbox doctor'"
        )


def check_path(path: str) -> PurePosixPath:
    """``path`` as a relative one inside the working directory. Raises BadConfig for any other name."""
    parts = path.split("/")
    bad = (
        not path
        or len(path) > _MOST_PATH
        or any(part in ("", ".", "..") for part in parts)
        or any(not character.isprintable() for character in path)
    )
    if bad:
        shown = path if len(path) <= _MOST_PATH else path[:_MOST_PATH] + "..."
        raise BadConfig(
            f"{shown!r} names no file of a sandbox: it is relative, at most {_MOST_PATH} printable "
            "characters, without '..' and empty parts"
        )
    return PurePosixPath(path)


def check_command(argv: Sequence[str], stdin: bytes | Talk) -> None:
    """Raises BadConfig for what is no command line, and for what can't be its stdin."""
    if isinstance(argv, str) or not argv or not all(isinstance(word, str) for word in argv):
        raise BadConfig(
            f"{argv!r:.200} is no command: it is a sequence of str, a program's name and its arguments"
        )
    if not isinstance(stdin, bytes) and not callable(stdin):
        raise BadConfig(
            f"stdin is {type(stdin).__name__}: it is bytes, or a Talk that is called with a channel"
        )


def lowered(limits: Limits, wanted: Limits | None) -> Limits:
    """What a run has of a session's ``limits`` where it asks for ``wanted``. Raises BadConfig for more."""
    if wanted is None:
        return limits
    if (wanted.disk_mib, wanted.network) != (limits.disk_mib, limits.network):
        raise BadConfig(
            f"a run has the disk and the network of its session (disk_mib={limits.disk_mib}, "
            f"network={limits.network}), not disk_mib={wanted.disk_mib}, network={wanted.network}: open "
            "another sandbox with these"
        )
    for entry in fields(Limits):
        most, asked = getattr(limits, entry.name), getattr(wanted, entry.name)
        if entry.name != "network" and most is not None and (asked is None or asked > most):
            raise BadConfig(
                f"a run can't have {entry.name}={asked!r} in a sandbox opened with {most!r}: ask for less, "
                "or open it with more"
            )
    return wanted
