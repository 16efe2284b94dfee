"""The process that starts bubblewraps for a large one; it runs as a script, on the standard library alone.

It is small, has one thread and few descriptors, so that starting is quick whatever its parent holds, and what
it starts dies with it, as it does when its parent ends. Each is started in its control group, under another
uid where this is root, with an empty environment, under limits of descriptors and core files and a system
call filter that spares what bubblewrap itself needs. No control group can have this process killed: it never
enters one. What bubblewrap leaves unwaited for, its pid 1 inside, is waited for here: the host's init may
take seconds, for which the dead count as processes of their group.
"""

from __future__ import annotations

import array
import ctypes
import errno
import json
import os
import resource
import select
import signal
import socket
import struct
import sys

__all__ = ["ARGUMENTS", "FILTER", "REPLY", "REQUEST", "STATUS", "serve"]

# uid, 0 for our own; how many of the words are files by which a group is entered, the rest is the command;
# bytes of the words, each ended by NUL.
REQUEST = struct.Struct("=III")
REPLY = struct.Struct("=i")  # 0 with a pidfd, or an errno
ARGUMENTS, FILTER, STATUS = 3, 4, 5  # descriptors of bubblewrap, after stdin, stdout and stderr
_FREE = 10  # what comes over the socket is numbered from here
_FILES = 1024  # open at once, by a process
_SET_NO_NEW_PRIVS, _SET_SECCOMP, _MODE_FILTER, _SET_CHILD_SUBREAPER = 38, 22, 2, 36  # of prctl


def serve(channel: socket.socket, parent: int, children: int) -> None:
    """Start what is asked for until ``parent``, a pidfd, ends or the other end is closed.

    ``children``: a descriptor that has something to read when a child has ended.
    """
    running: dict[int, int] = {}  # by pid: where its end is told
    poll = select.poll()
    for descriptor in (channel.fileno(), parent, children):
        poll.register(descriptor, select.POLLIN)
    while True:
        for descriptor, _ in poll.poll():
            if descriptor == parent:
                return
            if descriptor == children:
                os.read(children, 4096)
                _collect(running)
                continue
            _collect(running)  # so that the dead of a group's last run do not count in this one
            try:
                pidfd, pid, status = _start(channel)
            except EOFError:
                return
            except OSError as error:
                channel.sendall(REPLY.pack(error.errno or errno.EIO))
                continue
            running[pid] = status
            socket.send_fds(channel, [REPLY.pack(0)], [pidfd])
            os.close(pidfd)


def _start(channel: socket.socket) -> tuple[int, int, int]:
    """Its pidfd, its pid, its status. Raises EOFError at the end of requests, OSError for one that fails."""
    header, descriptors = _receive(channel)
    kept: list[int] = []
    try:
        if len(header) < REQUEST.size:
            raise EOFError
        uid, entrances, size = REQUEST.unpack(header)
        data = b""
        while len(data) < size:
            more = channel.recv(size - len(data))
            if not more:
                raise EOFError
            data += more
        if len(descriptors) <= STATUS:  # there was no room for all
            raise OSError(errno.EMFILE, "too many bubblewraps at once")
        words = data.split(b"\0")[:-1]
        descriptors += [os.open(path, os.O_WRONLY | os.O_CLOEXEC) for path in words[:entrances]]
        pid = os.fork()
        if not pid:
            _become(words[entrances:], uid=uid, descriptors=descriptors)
        try:
            _expose(pid)
            pidfd = os.pidfd_open(pid)
        except OSError:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise
        kept = [descriptors[STATUS]]
        return pidfd, pid, descriptors[STATUS]
    finally:
        for descriptor in descriptors:
            if descriptor not in kept:
                os.close(descriptor)


def _become(command: list[bytes], *, uid: int, descriptors: list[int]) -> None:
    """In a process just forked: enter its group and execute ``command``, or say why not; and end.

    ``descriptors``: first bubblewrap's, then those of files by which the group is entered. It moves itself,
    which takes no time (``agentrl.sandboxing.cgroups``); where the group has no memory left, it alone is
    killed. It does little in between: each page that it touches is copied.
    """
    try:
        for file in descriptors[STATUS + 1 :]:
            os.write(file, b"0")
        for target, source in enumerate(descriptors[: STATUS + 1]):
            os.dup2(source, target)
        if uid:
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
        os.execve(command[0], command, {})
    except OSError as error:
        os.write(descriptors[STATUS], b'{"errno": %d}\n' % (error.errno or errno.EIO))
    finally:
        os._exit(1)


def _expose(pid: int) -> None:
    """Have it, and its children, killed before others where the machine lacks memory."""
    file = os.open(f"/proc/{pid}/oom_score_adj", os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(file, b"1000")
    finally:
        os.close(file)


def _receive(channel: socket.socket) -> tuple[bytes, list[int]]:
    descriptors = array.array("i")
    room = socket.CMSG_SPACE((STATUS + 1) * descriptors.itemsize)
    header, attached, _, _ = channel.recvmsg(REQUEST.size, room, socket.MSG_CMSG_CLOEXEC)
    for _, _, data in attached:
        descriptors.frombytes(data[: len(data) - len(data) % descriptors.itemsize])
    return header, list(descriptors)


def _collect(running: dict[int, int]) -> None:
    """Wait for all that have ended; of bubblewraps say how, in a line of JSON after their own.

    Of their own the last may be only half there.
    """
    while True:
        try:
            pid, wait_status, usage = os.wait4(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        status = running.pop(pid, None)
        if status is None:
            continue
        end = {
            "own-code": os.waitstatus_to_exitcode(wait_status),
            "cpu-s": usage.ru_utime + usage.ru_stime,
            "peak-bytes": usage.ru_maxrss * 1024,
        }
        try:
            os.write(status, b"\n" + json.dumps(end).encode() + b"\n")
        except BrokenPipeError:  # nobody cares
            pass
        finally:
            os.close(status)


def _hear_of_children() -> int:
    """A descriptor that has something to read when a child has ended, or one that it left behind."""
    read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    return read


def _limit(filter_: bytes) -> None:
    """What is inherited by all that is started."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    files = _FILES if hard == resource.RLIM_INFINITY else min(_FILES, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    # 1, not 0: the kernel then does not start a program for core files either, as it may on the host.
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    core = 1 if hard == resource.RLIM_INFINITY else min(1, hard)
    resource.setrlimit(resource.RLIMIT_CORE, (core, core))
    if not filter_:
        return
    program = ctypes.create_string_buffer(filter_, len(filter_))

    class Program(ctypes.Structure):
        _fields_ = [("size", ctypes.c_ushort), ("code", ctypes.c_void_p)]

    libc = ctypes.CDLL(None, use_errno=True)
    argument = Program(len(filter_) // 8, ctypes.addressof(program))
    if libc.prctl(_SET_SECCOMP, _MODE_FILTER, ctypes.byref(argument), 0, 0) != 0:
        libc.prctl(_SET_NO_NEW_PRIVS, 1, 0, 0, 0)  # without which only root may
        if libc.prctl(_SET_SECCOMP, _MODE_FILTER, ctypes.byref(argument), 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "the kernel takes no system call filter")


def _main() -> None:
    channel = socket.socket(fileno=int(sys.argv[1]))
    channel.set_inheritable(False)
    parent = os.pidfd_open(int(sys.argv[2]))
    if os.getppid() != int(sys.argv[2]):  # it ended before we looked
        return
    while os.open("/dev/null", os.O_RDWR) < _FREE - 1:
        continue
    os.chdir("/")
    if os.geteuid() == 0:
        os.setgroups([])
    _limit(bytes.fromhex(sys.argv[3]))
    # Python ignores these, as would what is executed; a signal that is handled has its default there.
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, lambda *_: None)
    children = _hear_of_children()
    channel.sendall(b"+")
    serve(channel, parent, children)


if __name__ == "__main__":
    _main()
