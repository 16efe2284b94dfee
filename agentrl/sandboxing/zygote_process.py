"""What runs as the zygote: a small warm Python that forks a child into fresh namespaces for each command.

It is sent to a ``python3 -I -S`` as source text over a socket, its descriptor 0, and uses the standard
library alone. It never sees what a command is: the words, the code and the data go to the child, past it, so
that a child that reads all the memory it inherits finds nothing of another's.

A run has two processes here: an init, the first of its pid namespace, which no signal from within can reach
or stop, and its child, which gives up every right and becomes the command
(``agentrl.sandboxing.zygote_python``). The init reports how the child ended and ends itself, and the kernel
kills what is left. It dies with the zygote, and the zygote with the process that started it.
"""

from __future__ import annotations

import ctypes
import fcntl
import gc
import importlib
import json
import os
import resource
import select
import signal
import site
import socket
import stat
import struct
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, NoReturn

__all__ = ["Run", "live"]

_libc = ctypes.CDLL(None, use_errno=True)
_python_libc = ctypes.PyDLL(None, use_errno=True)  # keeps the interpreter's lock, which a child then has
_text, _number = ctypes.c_char_p, ctypes.c_ulong
_libc.mount.argtypes = (_text, _text, _text, _number, _text)
_libc.prctl.argtypes = (ctypes.c_int, _number, _number, _number, _number)

_NOSUID, _NODEV, _NOEXEC, _RDONLY, _REMOUNT, _BIND, _REC, _PRIVATE = 2, 4, 8, 1, 32, 4096, 16384, 1 << 18
_NEW_NS, _NEW_CGROUP, _NEW_UTS, _NEW_IPC = 0x20000, 0x2000000, 0x4000000, 0x8000000
_NEW_USER, _NEW_PID, _NEW_NET = 0x10000000, 0x20000000, 0x40000000
_DETACH = 2  # of umount2
_PDEATHSIG, _SET_DUMPABLE, _SET_SECCOMP, _CAPBSET_DROP, _SET_NO_NEW_PRIVS, _CAP_AMBIENT = 1, 4, 22, 24, 38, 47
_MOUNT_SETATTR = 442  # the same on every architecture
_LINKS = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
_DEVICES = {"null": (1, 3), "zero": (1, 5), "full": (1, 7), "random": (1, 8), "urandom": (1, 9)}
_INIT_UID = 65534
_ONLY_UID = 65533  # in a user namespace, which has this one alone
_FIRST_OF_LIBC = 32  # the signals that it keeps for itself
_MOST_FILES = 1024  # that a process may have open
_ETC = {  # beside what is copied; the command's uid has no name
    "passwd": "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/work:/bin/sh\n",
    "group": "root:x:0:\nnogroup:x:65534:\n",
    "hosts": "127.0.0.1 localhost sandbox\n::1 localhost\n",
    "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
}
_ETC_COPIED = ("ld.so.cache", "localtime", "mime.types")


class Run(NamedTuple):
    """One command as it was asked for, but for what it is."""

    session: int  # whose folder it works in
    uid: int
    temporary: str  # options of the tmpfs at /tmp and at /dev
    payload: int  # a descriptor of the command, which only the child reads
    stdin: int
    stdout: int
    stderr: int
    status: int  # b"X" and an int32 from the init in the end; b"E" and a text where there was no start
    groups: tuple[int, ...]  # descriptors to write "0" into, to enter a control group


def _check(result: int, what: str) -> None:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), what)


def _mount(source: str, target: str, *, kind: str = "", flags: int = 0, data: str = "") -> None:
    words = source.encode(), target.encode(), kind.encode() or None, flags, data.encode() or None
    _check(_libc.mount(*words), f"mount {kind} {source} at {target}")


def _prctl(option: int, value: int = 0, *more: int) -> None:
    _check(_libc.prctl(option, value, *(more + (0, 0, 0))[:3]), f"prctl {option}")


def live(setup: dict[str, Any]) -> list[str]:
    """Be a zygote until the host is gone. Returns only in a command's process: the words of the command."""
    control = socket.socket(fileno=0)
    _, (host,), _, _ = socket.recv_fds(control, 16, 1, socket.MSG_CMSG_CLOEXEC)
    try:
        _begin(setup["packages"], setup["hidden"])
        _load(setup["preload"])
    except (OSError, ImportError) as error:
        control.send(f"{type(error).__name__}: {error}".encode())
        os._exit(1)
    control.send(b"ok")
    run = _serve(control, host)
    return _confine(run, bytes.fromhex(setup["seccomp"]))


def _load(modules: Sequence[str]) -> None:
    """Import now what commands are likely to, from where they would get it."""
    one_thread = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    os.environ.update(one_thread)
    site.main()
    for name in modules:
        importlib.import_module(name)
    for name in one_thread:
        del os.environ[name]
    threads = os.listdir("proc/self/task")
    if len(threads) > 1:
        raise ImportError(f"preload of {', '.join(modules)} leaves {len(threads) - 1} threads behind")
    gc.collect()
    gc.freeze()  # else a collection in a child would copy everything


def _begin(packages: Sequence[str], hidden: Sequence[str]) -> None:
    """Give up what no run needs, and build the root that all runs see, read-only."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, signal.SIGPIPE, signal.SIGXFSZ}:
        if number < _FIRST_OF_LIBC:
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as a fresh Python has it
    os.umask(0o022)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    most = min(_MOST_FILES, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if os.geteuid() != 0:
        _enter_user_namespace()
    _check(_libc.unshare(_NEW_NS), "unshare the mount namespace")
    _build_root(packages, hidden)
    _prctl(_SET_NO_NEW_PRIVS, 1)
    with open("proc/sys/kernel/cap_last_cap", encoding="ascii") as file:
        for capability in range(int(file.read()) + 1):
            _prctl(_CAPBSET_DROP, capability)
    _prctl(_SET_DUMPABLE, 0)


def _enter_user_namespace() -> None:
    """Be a process in namespaces that are our own: only there may a pid namespace be returned to."""
    uid, gid = os.geteuid(), os.getegid()
    _check(_libc.unshare(_NEW_USER | _NEW_PID), "unshare the user and pid namespaces")
    _write("/proc/self/setgroups", "deny")
    _write("/proc/self/uid_map", f"{_ONLY_UID} {uid} 1")
    _write("/proc/self/gid_map", f"{_ONLY_UID} {gid} 1")
    if os.fork():
        os.closerange(0, 1 << 20)
        with suppress(ChildProcessError):
            os.waitpid(-1, 0)
        os._exit(0)
    _prctl(_PDEATHSIG, signal.SIGKILL)


def _build_root(packages: Sequence[str], hidden: Sequence[str]) -> None:
    """The root becomes that of the runs; the working directory lies outside, with what is theirs alone."""
    folders = {}  # the interpreter's own, where they really are
    for name in ("bin", "lib", "lib64"):
        folder = f"{sys.base_prefix}/{name}"
        if os.path.isdir(folder) and not folder.startswith("/usr/"):
            folders[folder] = os.path.realpath(folder)
    _mount("none", "/", flags=_REC | _PRIVATE)
    _mount("tmpfs", "/tmp", kind="tmpfs", flags=_NOSUID, data="mode=755,size=4m")
    os.chdir("/tmp")
    for name in ("old", "new", "proc", "sessions", "devices"):
        os.mkdir(name)
    _check(_libc.pivot_root(b".", b"old"), "pivot_root")
    os.chdir("/")
    _mount("/old/proc", "/proc", flags=_BIND | _REC)
    _mount("tmpfs", "/new", kind="tmpfs", flags=_NOSUID, data="mode=755,size=16m")
    for name in ("proc", "dev", "tmp", "work", "etc", "packages"):
        os.mkdir(f"/new/{name}")
    _show("/usr")
    for name in _LINKS:
        if os.path.islink(f"/old/{name}"):
            os.symlink(os.readlink(f"/old/{name}"), f"/new/{name}")
        elif os.path.isdir(f"/old/{name}"):
            _show(f"/{name}")
    for folder, real in folders.items():
        _show(real, at=folder)
    _fill_etc()
    _show_packages(packages)
    shown = {"/usr": "/usr"} | {real: folder for folder, real in folders.items()}
    _hide(hidden, shown | {folder: f"/packages/{number}" for number, folder in enumerate(packages)})
    if os.geteuid() == _ONLY_UID:
        _borrow_devices()
    _check(_libc.umount2(b"/old", _DETACH), "umount the old root")
    os.rmdir("/old")
    _mount("none", "/new", flags=_REMOUNT | _BIND | _RDONLY | _NOSUID)
    os.chroot("new")


def _fill_etc() -> None:
    for name, text in _ETC.items():
        _write(f"/new/etc/{name}", text)
    for name in _ETC_COPIED:
        if os.path.isfile(f"/old/etc/{name}"):
            with open(f"/old/etc/{name}", "rb") as source, open(f"/new/etc/{name}", "wb") as copy:
                copy.write(source.read())
    if os.path.isdir("/old/etc/alternatives"):
        _show("/etc/alternatives")


def _borrow_devices() -> None:
    """Where none can be made: the host's own, to be bound."""
    for name in _DEVICES:
        _write(f"/devices/{name}", "")
        _mount(f"/old/dev/{name}", f"/devices/{name}", flags=_BIND)


def _show(folder: str, *, at: str = "") -> None:
    """A folder of the host with all that is mounted there, read-only, under the same name."""
    source, target = f"/old{folder}", f"/new{at or folder}"
    os.makedirs(target, mode=0o755, exist_ok=True)
    _mount(source, target, flags=_BIND | _REC)
    if not _set_flags(target):  # before 5.12: without what is mounted there
        _check(_libc.umount2(target.encode(), _DETACH), f"umount {target}")
        _mount(source, target, flags=_BIND)
        _mount("none", target, flags=_REMOUNT | _BIND | _RDONLY | _NOSUID | _NODEV)


def _set_flags(target: str) -> bool:
    attributes = struct.pack("=4Q", _RDONLY | _NOSUID | _NODEV, 0, 0, 0)
    size, recursive = ctypes.c_size_t(len(attributes)), 0x8000
    return bool(_libc.syscall(_MOUNT_SETATTR, -100, target.encode(), recursive, attributes, size) == 0)


def _show_packages(packages: Sequence[str]) -> None:
    """Hide the interpreter's own packages, and let its ``site`` find those that were asked for instead."""
    os.mkdir("/new/packages/none")
    for number, folder in enumerate(packages):
        _show(folder, at=f"/packages/{number}")
    lines = "".join(f"/packages/{number}\n" for number in range(len(packages)))
    _write("/new/packages/none/agentrl.pth", lines)
    for folder in site.getsitepackages():
        _cover(f"/new{folder}", "none")


def _hide(hidden: Sequence[str], shown: Mapping[str, str]) -> None:
    """Cover folders of the host with an empty one; ``shown``: real paths, and where in the root each is."""
    os.mkdir("/new/packages/nothing")
    for folder in hidden:
        for real, seen in shown.items():
            if folder.startswith(f"{real}/"):
                _cover(f"/new{seen}{folder[len(real) :]}", "nothing")


def _cover(folder: str, name: str) -> None:
    if os.path.isdir(folder):
        _mount(f"/new/packages/{name}", folder, flags=_BIND)
        _mount("none", folder, flags=_REMOUNT | _BIND | _RDONLY | _NOSUID | _NODEV)


def _serve(control: socket.socket, host: int) -> Run:
    """Answer until the host, of which ``host`` is a pidfd, is gone. Returns in a command's process only."""
    namespace = os.open("proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    own, ended = os.pidfd_open(os.getpid()), _pidfd_of_the_dead()
    poll = select.poll()
    poll.register(control, select.POLLIN)
    poll.register(host, select.POLLIN)
    while True:
        if any(descriptor == host for descriptor, _ in poll.poll()):
            os._exit(0)
        data, descriptors, _, _ = socket.recv_fds(control, 4096, 32, socket.MSG_CMSG_CLOEXEC)
        if not data:
            os._exit(0)
        request = json.loads(data)
        answer = -1
        try:
            if request["do"] == "open":
                answer = _open_session(request)
            elif request["do"] == "close":
                _close_session(request["session"])
            else:
                payload, stdin, stdout, stderr, status, *groups = descriptors
                words = request["session"], request["uid"], request["temporary"]
                run = Run(*words, payload, stdin, stdout, stderr, status, tuple(groups))
                answer = _fork(run, namespace, own, ended)
                if answer == 0:
                    control.detach()  # its number means something else by now
                    return run
        except OSError as error:
            if request["do"] != "close":  # to which nobody waits for an answer
                control.send(f"{error.strerror}: {error.filename}".encode())
        for descriptor in descriptors:
            os.close(descriptor)
        if answer > 0:
            socket.send_fds(control, [b"ok"], [answer])
            os.close(answer)


def _open_session(request: dict[str, Any]) -> int:
    """A descriptor of a new tmpfs, in which ``work`` is what a session's runs have at /work."""
    place = f"sessions/{request['session']}"
    os.mkdir(place)
    _mount("tmpfs", place, kind="tmpfs", flags=_NOSUID | _NODEV, data=f"mode=755,{request['options']}")
    os.mkdir(f"{place}/work")
    if os.geteuid() != _ONLY_UID:
        os.chown(f"{place}/work", request["uid"], request["uid"])
    return os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def _close_session(number: int) -> None:
    _check(_libc.umount2(f"sessions/{number}".encode(), _DETACH), f"umount session {number}")
    os.rmdir(f"sessions/{number}")


def _pidfd_of_the_dead() -> int:
    if not (child := os.fork()):
        os._exit(0)
    pidfd = os.pidfd_open(child)
    os.waitpid(child, 0)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # from here on the kernel reaps: the inits
    return pidfd


def _fork(run: Run, namespace: int, own: int, ended: int) -> int:
    """A pidfd of the run's init; 0 in the command's process. ``own``: of the zygote, ``ended``: of nobody."""
    _check(_libc.unshare(_NEW_PID), "unshare the pid namespace")
    # Not os.fork: an init needs nothing of what Python mends in a child, which costs a fifth of a run.
    init = _python_libc.fork()
    if init < 0:
        code = ctypes.get_errno()
        _libc.setns(namespace, _NEW_PID)
        raise OSError(code, os.strerror(code), "fork")
    if init:
        _check(_libc.setns(namespace, _NEW_PID), "return to the pid namespace")
        with suppress(ProcessLookupError):  # all of the run may be over by now
            return os.pidfd_open(init)
        return os.dup(ended)
    try:
        _die_with_the_zygote(own)
        for group in run.groups:
            os.write(group, b"0")
        _prepare(run)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # before there is a child, which may end at once
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a handler would let signals from within reach the init
        child = os.fork()
    except OSError as error:
        _fail(run, error)
    if child:
        _watch(run, child, own)
    return 0


# -- in a run's init --


def _die_with_the_zygote(own: int) -> None:
    _prctl(_PDEATHSIG, signal.SIGKILL)
    if select.select([own], [], [], 0)[0]:  # it was dead by then
        os._exit(1)


def _fail(run: Run, error: OSError) -> NoReturn:
    """Say why there is no command; not the command's fault."""
    os.write(run.status, f"E{error.strerror}: {error.filename}".encode())
    os._exit(1)


def _prepare(run: Run) -> None:
    """Namespaces, and in them what a run has of its own."""
    _check(_libc.unshare(_NEW_NS | _NEW_CGROUP | _NEW_IPC | _NEW_UTS | _NEW_NET), "unshare")
    _prctl(_SET_DUMPABLE, 1)  # else its own files in /proc are root's
    _write("proc/self/oom_score_adj", "1000")
    _prctl(_SET_DUMPABLE, 0)
    _mount("proc", "/proc", kind="proc", flags=_NOSUID | _NODEV | _NOEXEC | _RDONLY)
    _mount("tmpfs", "/tmp", kind="tmpfs", flags=_NOSUID | _NODEV, data=f"mode=1777,{run.temporary}")
    _mount("tmpfs", "/dev", kind="tmpfs", flags=_NOSUID | _NOEXEC, data=f"mode=755,{run.temporary}")
    _make_devices()
    _mount(f"sessions/{run.session}/work", "/work", flags=_BIND)
    os.chdir("/work")  # and nothing leads outside again: no descriptor, no capability
    socket.sethostname("sandbox")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as loopback:
        fcntl.ioctl(loopback, 0x8914, struct.pack("16sh22x", b"lo", 0x41))  # SIOCSIFFLAGS: up, running


def _make_devices() -> None:
    """Nodes of this run's own, so that a lock on one is nobody else's."""
    old = os.umask(0)
    for name, (major, minor) in _DEVICES.items():
        if os.geteuid() != _ONLY_UID:
            os.mknod(f"/dev/{name}", 0o666 | stat.S_IFCHR, os.makedev(major, minor))
        else:
            _write(f"/dev/{name}", "")
            _mount(f"devices/{name}", f"/dev/{name}", flags=_BIND)
    os.mkdir("/dev/shm", 0o1777)
    os.umask(old)
    os.symlink("/proc/self/fd", "/dev/fd")
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        os.symlink(f"/proc/self/fd/{number}", f"/dev/{name}")


def _watch(run: Run, child: int, own: int) -> NoReturn:
    """Reap until the command's own process has ended, report it and end, which kills the rest."""
    _give_up_rights(_INIT_UID)
    _die_with_the_zygote(own)  # anew: a change of user forgets it
    _prctl(_SET_DUMPABLE, 0)
    os.dup2(run.status, 0)
    os.closerange(1, 1 << 20)
    while True:
        pid, status = os.waitpid(-1, 0)
        if pid == child:
            os.write(0, b"X" + struct.pack("=i", status))
            os._exit(0)


def _give_up_rights(uid: int) -> None:
    if os.geteuid() != _ONLY_UID:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    _prctl(_CAP_AMBIENT, 4)  # clear all
    header, none = struct.pack("=Ii", 0x20080522, 0), bytes(24)
    _check(_libc.capset(header, none), "capset")


# -- in the command's process --


def _confine(run: Run, program: bytes) -> list[str]:
    """Give everything up for good; what the command is. ``program``: a seccomp filter, or b"" for none."""
    try:
        for number, descriptor in enumerate((run.stdin, run.stdout, run.stderr)):
            os.dup2(descriptor, number)
        argv: list[str] = json.loads(os.read(run.payload, os.fstat(run.payload).st_size))
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _give_up_rights(run.uid)
        _prctl(_SET_DUMPABLE, 1)  # as an ordinary process: it can look at itself and its children
        if program:
            code = ctypes.create_string_buffer(program, len(program))
            pointer = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code))
            words = ctypes.create_string_buffer(pointer, len(pointer))
            _prctl(_SET_SECCOMP, 2, ctypes.addressof(words))
    except OSError as error:
        _fail(run, error)
    os.closerange(3, 1 << 20)
    return argv


def _write(path: str, text: str) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    os.write(file, text.encode())
    os.close(file)
