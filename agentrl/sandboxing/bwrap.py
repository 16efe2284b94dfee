"""Starting bubblewrap: its arguments, its process, and how what it says of its end is read.

It is started by a small process (``agentrl.sandboxing.bwrap_process``) with an empty environment, and waits
for its arguments on a pipe, so that it is in its control group before it makes a process. Its pid 1 inside is
under a filter too: whoever runs with the same uid may write its memory.
"""

from __future__ import annotations

import array
import functools
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentrl.sandbox import Limits, SandboxLost
from agentrl.sandboxing import bwrap_process
from agentrl.sandboxing.bwrap_process import ARGUMENTS, FILTER, REPLY, REQUEST, STATUS
from agentrl.sandboxing.cgroups import Group, expose
from agentrl.sandboxing.hierarchy import Hierarchy
from agentrl.sandboxing.pump import Pipes
from agentrl.sandboxing.seccomp import deny_list, telltale_filter

__all__ = [
    "SPARE_PIDS",
    "UID",
    "Ended",
    "Launcher",
    "Programs",
    "Running",
    "View",
    "find_programs",
    "make_etc",
]

UID = 65534  # inside, of user and group; outside it is another
SPARE_PIDS = 2  # bubblewrap and pid 1
_UNLIMITED = Limits(cpu_s=None, memory_mib=None, pids=None)
_PATIENCE_S = 20.0  # for bubblewrap to begin, or to be dead
# Where user namespaces can't be disabled inside, bubblewrap's own pid 1, which has the lesser filter, might
# make one. A shell with the full filter is pid 1 then. exec, for no name to mean a builtin of the shell; a
# subshell, for pid 1 to stay and collect the dead; its stderr elsewhere, since it would tell of signals.
_SHELL = 'exec 3>&2 2>/dev/null; (exec 2>&3 3>&-; exec "$@"); exit $?'
_PASSWD = f"root:x:0:0:root:/root:/bin/sh\nsandbox:x:{UID}:{UID}:sandbox:/work:/bin/sh\n"
_GROUP = f"root:x:0:\nsandbox:x:{UID}:\n"
_HOSTS = "127.0.0.1 localhost\n::1 localhost\n"
_NSSWITCH = "passwd: files\ngroup: files\nhosts: files dns\n"
_COPIED = ("ld.so.cache", "localtime", "alternatives", "mime.types", "protocols", "services")  # of /etc
_FOR_NETWORK = ("resolv.conf", "ssl/certs", "pki/tls/certs")


@dataclass(frozen=True, slots=True)
class Programs:
    """What is installed."""

    bwrap: str
    version: str
    can_disable_userns: bool


def find_programs() -> Programs | str:
    """What is installed, or what to install."""
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        return "bubblewrap is not installed: apt install bubblewrap, or dnf install bubblewrap"
    answers = [
        subprocess.run([bwrap, option], capture_output=True, text=True, timeout=_PATIENCE_S, check=False)
        for option in ("--help", "--version")
    ]
    flags, version = answers[0].stdout + answers[0].stderr, answers[1].stdout.strip()
    for flag in ("--clearenv", "--size", "--perms", "--json-status-fd", "--as-pid-1"):
        if flag not in flags:
            return f"{version} has no {flag}: install bubblewrap 0.5 or newer"
    return Programs(bwrap, version, "--disable-userns" in flags)


def make_etc(folder: Path) -> None:
    """Fill the /etc that is seen inside: users, hosts, and the host's tables that programs need to start."""
    folder.mkdir()
    for name, text in {
        "passwd": _PASSWD,
        "group": _GROUP,
        "hosts": _HOSTS,
        "nsswitch.conf": _NSSWITCH,
        "hostname": "sandbox\n",
        "resolv.conf": "",
    }.items():
        (folder / name).write_text(text)
    for name in ("ssl/certs", "pki/tls/certs"):
        (folder / name).mkdir(parents=True)
    for name in _COPIED:
        source = Path("/etc") / name
        with suppress(OSError):
            if source.is_dir():
                shutil.copytree(source, folder / name, symlinks=True)
            elif source.is_file():
                shutil.copyfile(source, folder / name)
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() else 0o644)


@dataclass(frozen=True, slots=True)
class View:
    """What is seen inside."""

    etc: Path
    work: Path
    folders: tuple[str, ...]  # of the host, read-only, beside /usr
    path: str
    size_mib: float | None  # of /tmp and of /dev/shm
    network: bool


@functools.lru_cache(maxsize=1024)
def _arguments(programs: Programs, view: View, *, is_filtered: bool) -> bytes:
    sized = [] if view.size_mib is None else ["--size", str(max(int(view.size_mib * 2**20), 4096))]
    environment = {"PATH": view.path, "HOME": "/work", "TMPDIR": "/tmp", "LANG": "C.UTF-8"}
    arguments = [
        *("--unshare-all", "--unshare-user", "--uid", str(UID), "--gid", str(UID)),
        *(["--share-net"] if view.network else []),
        *(["--disable-userns"] if programs.can_disable_userns else ["--as-pid-1"]),
        *("--hostname", "sandbox", "--cap-drop", "ALL", "--new-session", "--die-with-parent"),
        "--clearenv",
        *(word for name, value in environment.items() for word in ("--setenv", name, value)),
        *_system(view),
        *("--proc", "/proc", "--tmpfs", "/proc/1", "--remount-ro", "/proc/1", "--dev", "/dev"),
        *("--perms", "1777", *sized, "--tmpfs", "/dev/shm", "--remount-ro", "/dev"),
        *("--perms", "1777", *sized, "--tmpfs", "/tmp"),
        *("--bind", str(view.work), "/work", "--chdir", "/work", "--remount-ro", "/"),
        *(["--seccomp", str(FILTER)] if is_filtered else []),
        *("--json-status-fd", str(STATUS)),
    ]
    return b"".join(os.fsencode(argument) + b"\0" for argument in arguments)


def _system(view: View) -> list[str]:
    """What is bound of the host, all of it read-only."""
    binds = ["--ro-bind", "/usr", "/usr", "--ro-bind", str(view.etc), "/etc"]
    for name in ("/bin", "/sbin", "/lib", "/lib32", "/lib64"):
        if os.path.islink(name):
            binds += ["--symlink", os.readlink(name), name]
        elif os.path.isdir(name):
            binds += ["--ro-bind", name, name]
    for folder in view.folders:
        binds += ["--ro-bind", folder, folder]
    if view.network:
        for name in _FOR_NETWORK:
            binds += ["--ro-bind-try", os.path.realpath(f"/etc/{name}"), f"/etc/{name}"]
    return binds


@dataclass(frozen=True, slots=True)
class Ended:
    """What became of it."""

    code: int | None  # of the command, in the shell's way; None: it did not end by itself, or never ran
    own_code: int | None  # bubblewrap's, or minus the signal that killed it; None: what started it is gone
    cpu_s: float
    peak_bytes: int


class Running:
    """One bubblewrap, from its start until it is waited for."""

    def __init__(self, pid: int, pidfd: int, status: int, pipes: Pipes) -> None:
        self.pid = pid
        self.pipes = pipes
        self.exited = pidfd
        self._status = status
        self._said = b""
        self._pid_1: int | None = None  # a pidfd

    def find_pid_1(self) -> None:
        """Wait until it has begun, so that ``kill`` can do without a group. Raises SandboxLost."""
        until = time.monotonic() + _PATIENCE_S
        while b"\n" not in self._said and self._read(until):
            continue
        with suppress(ProcessLookupError):
            pid = self._told().get("child-pid")
            self._pid_1 = None if pid is None else os.pidfd_open(pid)

    def kill(self) -> None:
        """Kill pid 1 and with it all processes inside, and bubblewrap. Raises SandboxLost."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.exited, signal.SIGKILL)
        if self._pid_1 is None:
            return
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pid_1, signal.SIGKILL)
        # It ends when the last process of its namespace has.
        if not select.select([self._pid_1], [], [], _PATIENCE_S)[0]:
            raise SandboxLost("processes of a sandbox can't be killed: the kernel holds them")

    def wait(self) -> Ended:
        """What became of it, once it has ended. Raises SandboxLost."""
        until = time.monotonic() + _PATIENCE_S
        try:
            while self._read(until):
                continue
        finally:
            for descriptor in (self._status, self.exited, self._pid_1):
                if descriptor is not None:
                    os.close(descriptor)
        told = self._told()
        return Ended(
            code=told.get("exit-code"),
            own_code=told.get("own-code"),
            cpu_s=told.get("cpu-s", 0.0),
            peak_bytes=told.get("peak-bytes", 0),
        )

    def _read(self, until: float) -> bool:
        """More of what is said of it; False at the end. Raises SandboxLost."""
        if not select.select([self._status], [], [], max(until - time.monotonic(), 0))[0]:
            raise SandboxLost("bubblewrap neither begins nor ends: the machine is too busy")
        data = os.read(self._status, 4096)
        self._said += data
        return bool(data)

    def _told(self) -> Mapping[str, Any]:
        """What bubblewrap, then who started it, said in lines of JSON."""
        told: dict[str, Any] = {}
        for line in self._said.splitlines():
            told.update(json.loads(line))
        return told


class Launcher:
    """Starts bubblewraps, through one process that is started when first needed. Safe to use from threads."""

    def __init__(self, programs: Programs, hierarchy: Hierarchy) -> None:
        """Raises OSError where the process that starts them can't have a group."""
        self._programs = programs
        self._is_born_inside = hierarchy.version == 1
        self._home = hierarchy.make(_UNLIMITED) if self._is_born_inside else None
        self._filter = telltale_filter()
        self._lock = threading.Lock()
        self._starter: tuple[int, socket.socket, subprocess.Popen[bytes]] | None = None

    def start(self, argv: Sequence[str], view: View, *, group: Group, owner: int | None) -> Running:
        """Start ``argv`` in ``group``; ``owner``: the uid outside. Raises OSError, SandboxLost."""
        if not self._programs.can_disable_userns:
            argv = ["/bin/sh", "-c", _SHELL, "sh", *argv]
        command = [self._programs.bwrap, "--args", str(ARGUMENTS), "--", *argv]
        pipes = [os.pipe() for _ in range(STATUS + 1)]
        theirs = [ends[writes] for ends, writes in zip(pipes, (0, 1, 1, 0, 0, 1), strict=True)]
        stdin, stdout, stderr, arguments, filter_, status = ours = [
            ends[not writes] for ends, writes in zip(pipes, (0, 1, 1, 0, 0, 1), strict=True)
        ]
        try:
            for end in theirs[:3] if owner else ():
                os.fchown(end, owner or 0, owner or 0)  # so that it can be opened as /dev/stdin is
            entrances = [str(path) for path in group.procs] if self._is_born_inside else []
            pid, pidfd = self._ask([*entrances, *command], theirs, owner or 0, len(entrances))
        except BaseException:
            _close(ours)
            raise
        finally:
            _close(theirs)
        running = Running(pid, pidfd, status, Pipes(stdin, stdout, stderr))
        try:
            if self._is_born_inside:
                expose(pid)
            else:
                group.enter(pid)
            with suppress(BrokenPipeError):  # it died: its end says why
                _feed(filter_, self._filter)
                _feed(arguments, _arguments(self._programs, view, is_filtered=bool(self._filter)))
        except OSError:
            running.kill()
            running.wait()
            _close((stdin, stdout, stderr))
            raise
        finally:
            _close((arguments, filter_))
        return running

    def close(self) -> None:
        """End the process, and with it whatever it started that still runs. Idempotent."""
        with self._lock:
            starter, self._starter = self._starter, None
        if starter is not None and starter[0] == os.getpid():
            starter[1].close()
            starter[2].wait()
        if self._home is not None:
            self._home.close()

    def _ask(
        self, words: Sequence[str], descriptors: Sequence[int], uid: int, entrances: int
    ) -> tuple[int, int]:
        """Pid and pidfd."""
        data = b"".join(os.fsencode(word) + b"\0" for word in words)
        with self._lock:
            # Of a process that forked, it is the parent's; and somebody may have killed it.
            if not self._starter or self._starter[0] != os.getpid() or self._starter[2].poll() is not None:
                if self._starter:
                    self._starter[1].close()
                self._starter = self._start_starter()
            _, channel, process = self._starter
            try:
                socket.send_fds(channel, [REQUEST.pack(uid, entrances, len(data))], descriptors)
                channel.sendall(data)
                pid, pidfd = _reply(channel)
            except OSError as error:
                self._starter = None
                channel.close()
                process.kill()
                process.wait()
                raise SandboxLost(f"the process that starts bubblewraps is gone ({error})") from error
        if pid < 0:
            raise OSError(-pid, os.strerror(-pid))
        return pid, pidfd

    def _start_starter(self) -> tuple[int, socket.socket, subprocess.Popen[bytes]]:
        channel, theirs = socket.socketpair()
        channel.settimeout(_PATIENCE_S)
        filter_ = deny_list(making=True) or b""
        script = [bwrap_process.__file__, str(theirs.fileno()), str(os.getpid()), filter_.hex()]
        if self._home is not None:
            script += [str(path) for path in self._home.procs]
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", *script],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={},
                start_new_session=True,  # an interrupt from the terminal is for us alone
                pass_fds=[theirs.fileno()],
            )
        with suppress(OSError):
            if channel.recv(1) == b"+":
                return os.getpid(), channel, process
        channel.close()
        process.kill()
        raise SandboxLost(f"the process that starts bubblewraps ended with {process.wait()}")


def _reply(channel: socket.socket) -> tuple[int, int]:
    """Pid and pidfd, or minus an errno. Raises OSError."""
    room = socket.CMSG_SPACE(array.array("i").itemsize)
    data, attached, _, _ = channel.recvmsg(REPLY.size, room, socket.MSG_CMSG_CLOEXEC)
    if len(data) < REPLY.size:
        raise ConnectionResetError("it closed its end")
    pidfds = array.array("i")
    for _, _, descriptors in attached:
        pidfds.frombytes(descriptors)
    return REPLY.unpack(data)[0], pidfds[0] if pidfds else -1


def _feed(pipe: int, data: bytes) -> None:
    while data:
        data = data[os.write(pipe, data) :]


def _close(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
