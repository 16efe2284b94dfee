"""The process that starts bubblewraps for a large one; it runs as a script, on the standard library alone.

It is small, has one thread and few descriptors, so that starting is quick whatever its parent holds, and what
it starts dies with it, as it does when its parent ends. Each is started under another uid, where this is
root, with an empty environment, under limits of descriptors and core files and a system call filter that
spares what bubblewrap itself needs.
"""

from __future__ import annotations

import array
import ctypes
import json
import os
import resource
import select
import socket
import struct
import sys

__all__ = ["ARGUMENTS", "FILTER", "REPLY", "REQUEST", "STATUS", "serve"]

# uid, 0 for our own; how many of the words are files by which a group is entered, the rest is the command;
# bytes of the words, each ended by NUL.
REQUEST = struct.Struct("=III")
REPLY = struct.Struct("=iI")  # pid, or minus an errno; with it, where there is a process, its pidfd
ARGUMENTS, FILTER, STATUS = 3, 4, 5  # descriptors of bubblewrap, after stdin, stdout and stderr
_FREE = 10  # what comes over the socket is numbered from here
_FILES = 1024  # open at once, by a process
_SET_NO_NEW_PRIVS, _SET_SECCOMP, _MODE_FILTER = 38, 22, 2  # of prctl


def serve(channel: socket.socket, parent: int, home: list[bytes]) -> None:
    """Start what is asked for until ``parent``, a pidfd, ends or the other end is closed.

    ``home``: files by which this process returns to its own group, from that which it starts something in.
    """
    running: dict[int, tuple[int, int]] = {}  # by pidfd: pid, and where its end is told
    poll = select.poll()
    for descriptor in (channel.fileno(), parent):
        poll.register(descriptor, select.POLLIN)
    while True:
        for descriptor, _ in poll.poll():
            if descriptor == parent:
                return
            if descriptor == channel.fileno():
                started = _start(channel, home)
                if started is None:
                    return
                pidfd, pid, status = started
                if pid > 0:
                    running[pidfd] = pid, status
                    poll.register(pidfd, select.POLLIN)
            else:
                poll.unregister(descriptor)
                _tell_end(*running.pop(descriptor))
                os.close(descriptor)


def _start(channel: socket.socket, home: list[bytes]) -> tuple[int, int, int] | None:
    """Its pidfd, its pid or minus an errno, its status; None at the end of requests."""
    header, descriptors = _receive(channel)
    if len(header) < REQUEST.size or len(descriptors) <= STATUS:
        return None
    uid, entrances, size = REQUEST.unpack(header)
    data = b""
    while len(data) < size:
        more = channel.recv(size - len(data))
        if not more:
            return None
        data += more
    words = data.split(b"\0")[:-1]
    group, command = words[:entrances], words[entrances:]
    actions = [(os.POSIX_SPAWN_DUP2, source, target) for target, source in enumerate(descriptors)]
    try:
        _enter(group)
        if uid:
            os.setresgid(uid, uid, 0)
            os.setresuid(uid, uid, 0)  # the saved one becomes uid as well when the child executes
        pid = os.posix_spawn(command[0], command, {}, file_actions=actions)
    except OSError as error:
        pid = -(error.errno or 1)
    finally:
        if uid:
            os.setresuid(0, 0, 0)
            os.setresgid(0, 0, 0)
        if group:
            _enter(home)
    pidfd = os.pidfd_open(pid) if pid > 0 else -1
    for descriptor in descriptors[:STATUS] if pid > 0 else descriptors:
        os.close(descriptor)
    socket.send_fds(channel, [REPLY.pack(pid, 0)], [pidfd] if pid > 0 else [])
    return pidfd, pid, descriptors[STATUS]


def _enter(group: list[bytes]) -> None:
    """What is started from here on is born in ``group``; to move it later would take much longer."""
    for path in group:
        file = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(file, b"0")
        finally:
            os.close(file)


def _receive(channel: socket.socket) -> tuple[bytes, list[int]]:
    descriptors = array.array("i")
    room = socket.CMSG_SPACE((STATUS + 1) * descriptors.itemsize)
    header, attached, _, _ = channel.recvmsg(REQUEST.size, room, socket.MSG_CMSG_CLOEXEC)
    for _, _, data in attached:
        descriptors.frombytes(data[: len(data) - len(data) % descriptors.itemsize])
    return header, list(descriptors)


def _tell_end(pid: int, status: int) -> None:
    """A line of JSON after bubblewrap's own."""
    _, wait_status, usage = os.wait4(pid, 0)
    end = {
        "own-code": os.waitstatus_to_exitcode(wait_status),
        "cpu-s": usage.ru_utime + usage.ru_stime,
        "peak-bytes": usage.ru_maxrss * 1024,
    }
    try:
        os.write(status, json.dumps(end).encode() + b"\n")
    except BrokenPipeError:  # nobody cares
        pass
    finally:
        os.close(status)


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
    home = [os.fsencode(path) for path in sys.argv[4:]]
    _enter(home)
    channel.sendall(b"+")
    serve(channel, parent, home)


if __name__ == "__main__":
    _main()
