"""Starting bubblewrap: its process, and how what it says of its end is read.

It is started by a small process (``agentrl.sandboxing.bwrap_process``) in its control group, with an empty
environment, and waits for its arguments on a pipe. Its pid 1 inside is under a filter too: whoever runs with
the same uid may write its memory.
"""

from __future__ import annotations

import array
import errno
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self

from agentrl.sandbox import Limits, SandboxLost, Talk
from agentrl.sandboxing import bwrap_process
from agentrl.sandboxing.bwrap_process import ARGUMENTS, FILTER, REPLY, REQUEST, STATUS
from agentrl.sandboxing.bwrap_view import Programs, View, arguments_for
from agentrl.sandboxing.cgroups import Group
from agentrl.sandboxing.inherited import keep, release
from agentrl.sandboxing.pump import Clock, Pipes, Pumped, drive
from agentrl.sandboxing.seccomp import deny_list, telltale_filter

__all__ = ["SPARE_PIDS", "Ended", "Launcher", "Running"]

SPARE_PIDS = 2  # bubblewrap and pid 1
_PATIENCE_S = 20.0  # for bubblewrap to begin, or to be dead
_END_S = 10.0  # for who starts bubblewraps to end after its socket
_NONSENSE = b"--nonsense\0"  # an argument of which bubblewrap dies before it does anything
# Where user namespaces can't be disabled inside, bubblewrap's own pid 1, which has the lesser filter, might
# make one. A shell with the full filter is pid 1 then. exec, for no name to mean a builtin of the shell; a
# subshell, for pid 1 to stay and collect the dead; its stderr elsewhere, since it would tell of signals.
_SHELL = 'exec 3>&2 2>/dev/null; (exec 2>&3 3>&-; exec "$@"); exit $?'


@dataclass(frozen=True, slots=True)
class Ended:
    """What became of it."""

    code: int | None  # of the command, in the shell's way; None: it did not end by itself, or never ran
    own_code: int | None  # bubblewrap's, or minus the signal that killed it; None: what started it is gone
    has_begun: bool  # whether it got as far as a process in new namespaces
    errno: int  # for which bubblewrap itself could not be executed; 0: for none
    cpu_s: float
    peak_bytes: int


class Running:
    """One bubblewrap in ``group``, and our ends of its pipes; a context manager that kills and closes."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._exited = -1  # bubblewrap's pidfd
        self._pid_1 = -1  # a pidfd; without a group only
        self._open: set[int] = set()
        self._ours: list[int] = []  # by bubblewrap's number
        self._said = b""

    def start(self, launcher: Launcher, argv: Sequence[str], view: View, *, owner: int | None) -> None:
        """Have ``argv`` started; ``owner``: the uid outside. Raises OSError, SandboxLost."""
        theirs = []
        for is_read in (True, False, False, True, True, False):  # by bubblewrap
            read, write = os.pipe()
            keep(read, write)
            self._open |= {read, write}
            self._ours.append(write if is_read else read)
            theirs.append(read if is_read else write)
        for end in theirs[:3] if owner else ():
            os.fchown(end, owner or 0, owner or 0)  # so that it can be opened as /dev/stdin is
        entrances = [str(path) for path in self._group.procs]
        self._exited = launcher.ask(argv, theirs, uid=owner or 0, entrances=entrances)
        self._shut(*theirs)
        if self._exited < 0:
            self._turn_away()
            self.wait()
            raise SandboxLost("a sandbox's process is out of reach: raise the limit of open files")
        with suppress(BrokenPipeError):  # it died: its end says why
            _feed(self._ours[FILTER], launcher.filter)
            _feed(self._ours[ARGUMENTS], launcher.arguments(view))
        self._shut(self._ours[ARGUMENTS], self._ours[FILTER])

    def drive(self, *, stdin: bytes | Talk, limits: Limits, closing: threading.Event) -> Pumped:
        """Until it is over and everything is dead. Raises SandboxLost."""
        if not self._group.procs:
            self._find_pid_1()
        clock = Clock(self._exited, cpu_s=self._group.cpu_s, kill=self.kill, closing=closing)
        streams = self._ours[:3]
        self._open -= {*streams}  # closed by what follows
        return drive(Pipes(*streams), clock, stdin=stdin, limits=limits)

    def wait(self) -> Ended:
        """What became of it, once it has ended. Raises SandboxLost."""
        until = time.monotonic() + _PATIENCE_S
        while "own-code" not in (told := self._told()) and self._read(until):
            continue
        has_group = bool(self._group.procs)
        return Ended(
            code=told.get("exit-code"),
            own_code=told.get("own-code"),
            has_begun="child-pid" in told,
            errno=told.get("errno", 0),
            cpu_s=self._group.cpu_s() if has_group else told.get("cpu-s", 0.0),
            peak_bytes=self._group.peak_bytes() if has_group else told.get("peak-bytes", 0),
        )

    def kill(self) -> None:
        """Kill bubblewrap and with it all processes inside. Raises SandboxLost."""
        for pidfd in (self._exited, self._pid_1):
            if pidfd >= 0:
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        # Pid 1 ends when the last process of its namespace has.
        if self._pid_1 >= 0 and not _is_readable(self._pid_1, _PATIENCE_S):
            raise SandboxLost("processes of a sandbox can't be killed: the kernel holds them")
        self._group.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *raised: object) -> None:
        try:
            if kind is not None:
                self._turn_away()
                self.kill()
        finally:
            self._shut(*self._open)
            for pidfd in (self._exited, self._pid_1):
                if pidfd >= 0:
                    os.close(pidfd)

    def _turn_away(self) -> None:
        """Where it waits for its arguments still it ends, even if it can't be killed."""
        if len(self._ours) > ARGUMENTS and self._ours[ARGUMENTS] in self._open:
            with suppress(OSError):
                _feed(self._ours[ARGUMENTS], _NONSENSE)
            self._shut(self._ours[ARGUMENTS])

    def _find_pid_1(self) -> None:
        """Wait until it has begun, so that ``kill`` can do without a group. Raises SandboxLost."""
        until = time.monotonic() + _PATIENCE_S
        while b"\n" not in self._said and self._read(until):
            continue
        pid = self._told().get("child-pid")
        try:
            self._pid_1 = -1 if pid is None else os.pidfd_open(pid)
        except ProcessLookupError:
            return
        except OSError as error:
            raise SandboxLost(f"a sandbox's process is out of reach: {error}") from error

    def _read(self, until: float) -> bool:
        """More of what is said of it; False at the end. Raises SandboxLost."""
        if not _is_readable(self._ours[STATUS], until - time.monotonic()):
            if self._exited >= 0 and _is_readable(self._exited, 0):
                return False  # who would have said more is gone, and a stranger has the pipe
            raise SandboxLost("bubblewrap neither begins nor ends: the machine is too busy")
        data = os.read(self._ours[STATUS], 4096)
        self._said += data
        return bool(data)

    def _told(self) -> Mapping[str, Any]:
        """What bubblewrap, then who started it, said in lines of JSON."""
        told: dict[str, Any] = {}
        for line in self._said.splitlines():
            with suppress(ValueError):  # it was killed while it wrote that
                told.update(json.loads(line))
        return told

    def _shut(self, *descriptors: int) -> None:
        self._open -= {*descriptors}
        _close(*descriptors)


class Launcher:
    """Has bubblewraps started by one process, which starts when first needed. Safe to use from threads."""

    def __init__(self, programs: Programs) -> None:
        self.filter = telltale_filter()
        self._programs = programs
        self._lock = threading.Lock()
        self._starter: tuple[int, socket.socket, subprocess.Popen[bytes]] | None = None

    def arguments(self, view: View) -> bytes:
        """For a bubblewrap that shows ``view``."""
        return arguments_for(self._programs, view, is_filtered=bool(self.filter))

    def ask(
        self, argv: Sequence[str], descriptors: Sequence[int], *, uid: int, entrances: Sequence[str]
    ) -> int:
        """A bubblewrap that is to execute ``argv``: its pidfd, or -1 where there was no room for one.

        ``descriptors``: it has these, in this order; ``entrances``: files of its control group. Raises
        OSError, SandboxLost.
        """
        if not self._programs.can_disable_userns:
            argv = ["/bin/sh", "-c", _SHELL, "sh", *argv]
        words = [*entrances, self._programs.bwrap, "--args", str(ARGUMENTS), "--", *argv]
        data = b"".join(os.fsencode(word) + b"\0" for word in words)
        with self._lock:
            channel = self._channel()
            try:
                socket.send_fds(channel, [REQUEST.pack(uid, len(entrances), len(data))], descriptors)
                channel.sendall(data)
                number, pidfd = _reply(channel)
            except OSError as error:
                self._give_up()
                raise SandboxLost(f"the process that starts bubblewraps is gone ({error})") from error
            except BaseException:  # a signal's handler raised
                self._give_up()
                raise
        if number:
            raise OSError(number, os.strerror(number))
        return pidfd

    def close(self) -> None:
        """End the process, and with it whatever it started that still runs. Idempotent."""
        with self._lock:
            starter, self._starter = self._starter, None
        if starter is None or starter[0] != os.getpid():
            return
        _, channel, process = starter
        with suppress(OSError):
            channel.shutdown(socket.SHUT_RDWR)  # whoever else has it
        _hang_up(channel)
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _channel(self) -> socket.socket:
        """To the process, which is started where there is none. Raises OSError, SandboxLost."""
        # Of a process that forked, it is the parent's; and somebody may have killed it.
        if self._starter and (self._starter[0] != os.getpid() or self._starter[2].poll() is not None):
            _hang_up(self._starter[1])
            self._starter = None
        if self._starter is None:
            self._starter = _start_starter()
        return self._starter[1]

    def _give_up(self) -> None:
        """End it, and with it what it began: what it says from now on may answer an earlier question."""
        starter, self._starter = self._starter, None
        if starter is not None:
            starter[2].kill()
            _hang_up(starter[1])
            starter[2].wait()


def _start_starter() -> tuple[int, socket.socket, subprocess.Popen[bytes]]:
    """Our pid, our end of its socket, the process. Raises OSError, SandboxLost."""
    filter_ = deny_list(making=True) or b""
    channel, theirs = socket.socketpair()
    keep(channel.fileno(), theirs.fileno())
    process = None
    try:
        channel.settimeout(_PATIENCE_S)
        script = [bwrap_process.__file__, str(theirs.fileno()), str(os.getpid()), filter_.hex()]
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", *script],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={},
            start_new_session=True,  # an interrupt from the terminal is for us alone
            pass_fds=[theirs.fileno()],
        )
        _hang_up(theirs)
        with suppress(OSError):
            if channel.recv(1) == b"+":
                return os.getpid(), channel, process
        process.kill()
        raise SandboxLost(f"the process that starts bubblewraps ended with {process.wait()}")
    except BaseException:
        _hang_up(channel)
        if process is not None:
            process.kill()
            process.wait()
        raise
    finally:
        _hang_up(theirs)


def _reply(channel: socket.socket) -> tuple[int, int]:
    """0 and a pidfd, -1 where there is no room for it; or an errno. Raises OSError."""
    room = socket.CMSG_SPACE(array.array("i").itemsize)
    data, attached, _, _ = channel.recvmsg(REPLY.size, room, socket.MSG_CMSG_CLOEXEC)
    if len(data) < REPLY.size:
        raise ConnectionResetError(errno.ECONNRESET, "it closed its end")
    pidfds = array.array("i")
    for _, _, descriptors in attached:
        pidfds.frombytes(descriptors)
    return REPLY.unpack(data)[0], pidfds[0] if pidfds else -1


def _is_readable(descriptor: int, seconds: float) -> bool:
    """Whether there is something to read within that time, or an end; unlike select's, for any number."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(max(seconds, 0) * 1000))


def _feed(pipe: int, data: bytes) -> None:
    while data:
        data = data[os.write(pipe, data) :]


def _hang_up(channel: socket.socket) -> None:
    if channel.fileno() >= 0:
        release(channel.fileno())
        channel.close()


def _close(*descriptors: int) -> None:
    release(*descriptors)
    for descriptor in descriptors:
        os.close(descriptor)
