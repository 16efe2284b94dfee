"""Starting bubblewrap: its arguments, its process, and how what it says of its end is read.

The launcher is started with an empty environment and waits for its arguments on a pipe, so that it is in its
control group before it makes a process. Its pid 1 inside is a shell under the same system call filter as the
code: bubblewrap's own has none, and whoever runs with its uid may write its memory.
"""

from __future__ import annotations

import os
import re
import resource
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from agentrl.cgroups import Group
from agentrl.pump import Pipes
from agentrl.sandbox import SandboxLost

__all__ = ["SPARE_PIDS", "UID", "Launcher", "Programs", "Running", "View", "find_programs", "make_etc"]

UID = 65534  # inside, of user and group; outside it is another
SPARE_PIDS = 2  # bubblewrap and the shell that is pid 1
_FILES = 1024  # open at once, by a process
_PATIENCE_S = 20.0  # for bubblewrap to begin, or to be dead
# exec, for no name to mean a builtin of the shell; a subshell, for pid 1 to stay and collect the dead; the
# shell's own stderr elsewhere, since it would tell there of signals.
_PID_1 = (
    'ulimit -n {files}; ulimit -c 0; unset PWD; exec 3>&2 2>/dev/null; (exec 2>&3 3>&-; exec "$@"); exit $?'
)
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
    setpriv: str  # "": not needed, we aren't root
    version: str
    can_disable_userns: bool


def find_programs() -> Programs | str:
    """What is installed, or what to install."""
    bwrap, setpriv = shutil.which("bwrap"), shutil.which("setpriv")
    if bwrap is None:
        return "bubblewrap is not installed: apt install bubblewrap, or dnf install bubblewrap"
    if os.geteuid() == 0 and setpriv is None:
        return "setpriv is not installed, which drops root's uid: apt install util-linux"
    answers = [
        subprocess.run([bwrap, option], capture_output=True, text=True, timeout=_PATIENCE_S, check=False)
        for option in ("--help", "--version")
    ]
    flags, version = answers[0].stdout + answers[0].stderr, answers[1].stdout.strip()
    for flag in ("--clearenv", "--size", "--perms", "--json-status-fd", "--as-pid-1"):
        if flag not in flags:
            return f"{version} has no {flag}: install bubblewrap 0.5 or newer"
    return Programs(bwrap, (setpriv or "") if os.geteuid() == 0 else "", version, "--disable-userns" in flags)


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
    folders: Sequence[str]  # of the host, read-only, beside /usr
    path: str
    size_mib: float | None  # of /tmp and of /dev/shm
    network: bool


def _arguments(programs: Programs, view: View, *, filter_at: int | None, status_at: int) -> bytes:
    sized = [] if view.size_mib is None else ["--size", str(max(int(view.size_mib * 2**20), 4096))]
    environment = {"PATH": view.path, "HOME": "/work", "TMPDIR": "/tmp", "LANG": "C.UTF-8"}
    arguments = [
        *("--unshare-all", "--unshare-user", "--uid", str(UID), "--gid", str(UID)),
        *(["--share-net"] if view.network else []),
        *(["--disable-userns"] if programs.can_disable_userns else []),
        *("--hostname", "sandbox", "--cap-drop", "ALL", "--new-session", "--die-with-parent", "--as-pid-1"),
        "--clearenv",
        *(word for name, value in environment.items() for word in ("--setenv", name, value)),
        *_system(view),
        *("--proc", "/proc", "--dev", "/dev"),
        *("--perms", "1777", *sized, "--tmpfs", "/dev/shm", "--remount-ro", "/dev"),
        *("--perms", "1777", *sized, "--tmpfs", "/tmp"),
        *("--bind", str(view.work), "/work", "--chdir", "/work", "--remount-ro", "/"),
        *([] if filter_at is None else ["--seccomp", str(filter_at)]),
        *("--json-status-fd", str(status_at)),
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


class Running:
    """One bubblewrap, from its start until it is waited for."""

    def __init__(self, process: subprocess.Popen[bytes], pipes: Pipes, status: int) -> None:
        self._process = process
        self.pipes = pipes
        self._status = status
        self._said = b""
        self._pid_1: int | None = None  # a pidfd
        self.exited = os.pidfd_open(process.pid)

    @property
    def pid(self) -> int:
        """Of bubblewrap, outside."""
        return self._process.pid

    def find_pid_1(self) -> None:
        """Wait until it has begun, so that ``kill`` can do without a group. Raises SandboxLost."""
        until = time.monotonic() + _PATIENCE_S
        while b"\n" not in self._said:
            if not select.select([self._status], [], [], max(until - time.monotonic(), 0))[0]:
                raise SandboxLost("bubblewrap does not begin: the machine is too busy")
            data = os.read(self._status, 4096)
            if not data:
                return
            self._said += data
        match = re.search(rb'"child-pid": (\d+)', self._said)
        with suppress(ProcessLookupError):
            self._pid_1 = os.pidfd_open(int(match[1])) if match else None

    def kill(self) -> None:
        """Kill pid 1 and with it all processes inside, and bubblewrap. Raises SandboxLost."""
        with suppress(ProcessLookupError):  # not Popen's kill, which would wait for it
            signal.pidfd_send_signal(self.exited, signal.SIGKILL)
        if self._pid_1 is None:
            return
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pid_1, signal.SIGKILL)
        # It ends when the last process of its namespace has.
        if not select.select([self._pid_1], [], [], _PATIENCE_S)[0]:
            raise SandboxLost("processes of a sandbox can't be killed: the kernel holds them")

    def wait(self) -> tuple[int | None, int, resource.struct_rusage]:
        """The command's exit code, None if it never ran to its end; bubblewrap's own; what it used."""
        _, wait_status, usage = os.wait4(self.pid, 0)
        self._process.returncode = os.waitstatus_to_exitcode(wait_status)
        os.set_blocking(self._status, False)
        with suppress(BlockingIOError):
            while data := os.read(self._status, 4096):
                self._said += data
        for descriptor in (self._status, self.exited, self._pid_1):
            if descriptor is not None:
                os.close(descriptor)
        match = re.search(rb'"exit-code": (\d+)', self._said)
        return (int(match[1]) if match else None), self._process.returncode, usage


class Launcher:
    """Starts bubblewraps, all from one thread: they die with the thread that started them."""

    def __init__(self, programs: Programs, filter_: bytes | None) -> None:
        self._programs = programs
        self._filter = filter_
        self._pid = os.getpid()
        self._thread = ThreadPoolExecutor(1, "agentrl-bubblewrap")
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        files = _FILES if hard == resource.RLIM_INFINITY else min(_FILES, hard)
        self._pid_1 = _PID_1.format(files=files)

    def start(self, argv: Sequence[str], view: View, *, group: Group, owner: int | None) -> Running:
        """Start ``argv`` in ``group``; ``owner``: the uid outside. Raises OSError, ValueError for NULs."""
        if os.getpid() != self._pid:  # forked: the thread did not come along
            self._pid, self._thread = os.getpid(), ThreadPoolExecutor(1, "agentrl-bubblewrap")
        return self._thread.submit(self._start, argv, view, group, owner).result()

    def close(self) -> None:
        """End the thread, and with it whatever it started that still runs."""
        self._thread.shutdown()

    def _start(self, argv: Sequence[str], view: View, group: Group, owner: int | None) -> Running:
        arguments, filter_, status = os.pipe(), os.pipe(), os.pipe()
        pipes = [os.pipe() for _ in range(3)]
        theirs = [arguments[0], filter_[0], status[1], pipes[0][0], pipes[1][1], pipes[2][1]]
        ours = [arguments[1], filter_[1], status[0], pipes[0][1], pipes[1][0], pipes[2][0]]
        words = [self._programs.bwrap, "--args", str(arguments[0]), "--"]
        if owner is not None:
            drop = [f"--reuid={owner}", f"--regid={owner}", "--clear-groups"]
            words = [self._programs.setpriv, *drop, *words]
        try:
            process = subprocess.Popen(
                [*words, "/bin/sh", "-c", self._pid_1, "sh", *argv],
                stdin=pipes[0][0],
                stdout=pipes[1][1],
                stderr=pipes[2][1],
                cwd="/",
                env={},
                start_new_session=True,  # an interrupt from the terminal is for us alone
                pass_fds=theirs[:3],
            )
        except BaseException:
            _close(ours)
            raise
        finally:
            _close(theirs)
        running = Running(process, Pipes(*ours[3:]), ours[2])
        try:
            group.enter(process.pid)
            with suppress(BrokenPipeError):  # it died: its end says why
                _feed(ours[1], self._filter or b"")
                filter_at = filter_[0] if self._filter else None
                _feed(
                    ours[0],
                    _arguments(self._programs, view, filter_at=filter_at, status_at=status[1]),
                )
        except OSError:
            running.kill()
            running.wait()
            _close([*ours[:2], *ours[3:]])
            raise
        _close(ours[:2])
        return running


def _feed(pipe: int, data: bytes) -> None:
    while data:
        data = data[os.write(pipe, data) :]


def _close(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
