"""The first process of a container: it starts commands, relays their pipes, and kills what they leave.

Its source is what ``python3 -c`` gets in the container, so it needs the standard library only, of Python 3.8
or later. It speaks in frames over its stdin and stdout with ``agentrl.sandboxing.container_link`` and ends
with its stdin: with the host's process that holds the other end, however that one dies.

It has the commands' own uid, no capability, and is out of their reach: the first process of a PID namespace
gets no signal from inside it that it has no handler for, SIGKILL included, and one that is not dumpable is
neither traced nor are its memory and its descriptors opened. Slowing it down or having it run out of memory
is possible, and ends the container.
"""

from __future__ import annotations

import base64
import ctypes
import errno
import json
import os
import select
import signal
import stat
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial

__all__ = [
    "CHUNK",
    "DATA",
    "DEAD",
    "DONE",
    "END",
    "ERR",
    "EXIT",
    "FAILED",
    "HEADER",
    "INPUT",
    "KILL",
    "OUT",
    "READ",
    "READY",
    "RUN",
    "SHUT",
    "STARTED",
    "TOOK",
    "WRITE",
    "serve",
]

HEADER = struct.Struct(">cI")  # kind, bytes that follow
CHUNK = 1 << 16  # bytes, the longest frame of data

# From the host.
RUN = b"r"  # a command's arguments, as JSON; then INPUT, END and at last KILL
INPUT = b"i"  # for its stdin, or for the file that is written
END = b"e"  # of that
KILL = b"k"  # all that there is but this process; answered by DEAD
WRITE = b"w"  # a file of that name, with INPUT and END; answered by DONE or FAILED
READ = b"g"  # a file, JSON of name and most bytes; answered by DATA, then DONE or FAILED
# To the host.
READY = b"R"
STARTED = b"S"
OUT = b"O"  # what the command printed; empty: nothing will come any more
ERR = b"E"
TOOK = b"T"  # so many bytes of INPUT went into the command's stdin
SHUT = b"C"  # the command closed its stdin
EXIT = b"X"  # exit code, or minus the signal
DEAD = b"D"
DATA = b"F"
DONE = b"Z"
FAILED = b"N"  # errno

_WORK = "/work"
_PATH = os.environ.get("PATH", "/usr/local/bin:/usr/bin:/bin")  # the image's
_MOST_LAST_WORDS = 16  # chunks
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NUMBER = struct.Struct(">i")
_SET_DUMPABLE, _SET_SECCOMP, _FILTER_MODE = 4, 22, 2  # of prctl(2)


def serve() -> None:
    """Do what the host says until it hangs up."""
    if ctypes.CDLL(None, use_errno=True).prctl(_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
    wake, woken = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's handler would let it in
    _say(READY)
    while True:
        kind, data = _hear()
        if kind == RUN:
            _Command(json.loads(data), wake).relay()
        elif kind == WRITE:
            _answer(partial(_write, data.decode()))
        elif kind == READ:
            path, most = json.loads(data)
            _answer(partial(_read, path, most))
        elif kind == KILL:
            _kill_all()
            _say(DEAD)


def _hear() -> tuple[bytes, bytes]:
    kind, size = HEADER.unpack(_exactly(HEADER.size))
    return kind, _exactly(size)


def _exactly(size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = os.read(0, size - len(data))
        if not more:  # the host is gone, and with this process all others go
            os._exit(0)
        data += more
    return data


def _say(kind: bytes, data: bytes = b"") -> None:
    frame = HEADER.pack(kind, len(data)) + data
    while frame:
        frame = frame[os.write(1, frame) :]


# -- a command --


class _Command:
    """One command, from its start until the host has it killed."""

    def __init__(self, argv: list[str], wake: int) -> None:
        self._wake = wake
        self._pending = b""  # for its stdin
        self._is_ending = False  # its stdin
        reader, self._in = os.pipe()
        self._out, out = os.pipe()
        self._err, err = os.pipe()
        self._pid = _start(argv, (reader, out, err))
        for descriptor in (reader, out, err):
            os.close(descriptor)
        self._poll = select.poll()
        for descriptor in (0, wake, self._out, self._err):
            self._poll.register(descriptor, select.POLLIN)
        self._poll.register(self._in, 0)
        for descriptor in (self._in, self._out, self._err):
            os.set_blocking(descriptor, False)

    def relay(self) -> None:
        """Until the host wants it over; then all is dead, and what was printed is said."""
        _say(STARTED)
        while self._turn():
            pass
        self._shut()
        _kill_all()
        for descriptor, kind in ((self._out, OUT), (self._err, ERR)):
            while self._pass_on(descriptor, kind):
                pass
            os.close(descriptor)
        _say(DEAD)

    def _turn(self) -> bool:
        """Do what there is to do; False once the host wants it over."""
        for descriptor, events in self._poll.poll():
            if descriptor == 0:
                kind, data = _hear()
                if kind == KILL:
                    return False
                self._pending += data
                self._is_ending = self._is_ending or kind == END
                self._feed()
            elif descriptor == self._wake:
                os.read(descriptor, 4096)
                self._reap()
            elif descriptor == self._in:
                self._feed(is_shut=bool(events & select.POLLERR))
            elif descriptor == self._out:
                self._pass_on(descriptor, OUT)
            elif descriptor == self._err:
                self._pass_on(descriptor, ERR)
        return True

    def _feed(self, *, is_shut: bool = False) -> None:
        """Write what its stdin takes; what a closed one does not take is dropped."""
        took = 0
        if self._in >= 0 and not is_shut:
            try:
                took = os.write(self._in, self._pending) if self._pending else 0
            except BlockingIOError:
                pass
            except BrokenPipeError:
                is_shut = True
        if is_shut and self._in >= 0:
            self._shut()
            _say(SHUT)
        if self._in < 0:
            took = len(self._pending)
        if took:
            self._pending = self._pending[took:]
            _say(TOOK, _NUMBER.pack(took))
        if self._in >= 0 and self._is_ending and not self._pending:
            self._shut()
        elif self._in >= 0:
            self._poll.modify(self._in, select.POLLOUT if self._pending else 0)

    def _shut(self) -> None:
        if self._in >= 0:
            self._poll.unregister(self._in)
            os.close(self._in)
            self._in = -1

    def _pass_on(self, descriptor: int, kind: bytes) -> bytes | None:
        """Say what was printed; b"" at its end, None where there is nothing now."""
        try:
            data = os.read(descriptor, CHUNK)
        except BlockingIOError:
            return None
        _say(kind, data)
        if not data:
            with suppress(KeyError):
                self._poll.unregister(descriptor)
        return data

    def _reap(self) -> None:
        """Bury the dead; of the command itself say so, after its last words."""
        for pid, code in _bury():
            if pid == self._pid:
                for descriptor, kind in ((self._out, OUT), (self._err, ERR)):
                    for _ in range(_MOST_LAST_WORDS):  # others may print for ever
                        if not self._pass_on(descriptor, kind):
                            break
                _say(EXIT, _NUMBER.pack(code))


def _start(argv: list[str], pipes: tuple[int, int, int]) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setsid()
        for number, pipe in enumerate(pipes):
            os.dup2(pipe, number)
        for ignored in (signal.SIGPIPE, signal.SIGXFSZ):  # by Python, and what is ignored stays so
            signal.signal(ignored, signal.SIG_DFL)
        _unlock()
        os.chdir(_WORK)
        _filter_calls()
        os.execvpe(argv[0], argv, {"PATH": _PATH, "HOME": _WORK, "TMPDIR": "/tmp", "LANG": "C.UTF-8"})
    except (OSError, ValueError) as error:
        os.write(2, f"{argv[0]}: {getattr(error, 'strerror', error)}\n".encode(errors="replace"))
    finally:
        os._exit(127)


def _filter_calls() -> None:
    """Refuse this process and its children what the engine's own filter may allow.

    The filters come as an argument, JSON of base64 by the machine's name; a machine without one has none.
    """
    program = base64.b64decode(json.loads(sys.argv[1]).get(os.uname().machine, ""))
    if program:
        held = ctypes.create_string_buffer(program, len(program))
        head = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(held))
        if ctypes.CDLL(None, use_errno=True).prctl(_SET_SECCOMP, _FILTER_MODE, head, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl")


def _bury() -> Iterator[tuple[int, int]]:
    """Process numbers and exit codes, or minus the signal, of what has died."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        yield pid, os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status)


def _kill_all() -> None:
    """Every process of this container but this one, and wait until none is left."""
    while True:
        try:
            os.kill(-1, signal.SIGKILL)  # at once for all, so that none is forked meanwhile
        except ProcessLookupError:  # there is no other, not even a dead one
            return
        for _ in _bury():
            pass
        time.sleep(0.0002)


# -- files, when no command runs --


def _unlock() -> None:
    """Whatever mode commands have given to their working directory, it can be entered."""
    os.chmod(_WORK, 0o700)


def _answer(work: Callable[[], None]) -> None:
    try:
        work()
    except OSError as error:
        _say(FAILED, _NUMBER.pack(error.errno or errno.EIO))
    else:
        _say(DONE)


def _read(path: str, most: int) -> None:
    try:
        with _parent(path, make=False) as (parent, name):
            file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=parent)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.ENXIO, errno.EISDIR, errno.EACCES):
            raise FileNotFoundError(errno.ENOENT, path) from None
        raise
    try:
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode):
            raise FileNotFoundError(errno.ENOENT, path)
        if found.st_size > most:
            raise OSError(errno.EFBIG, path)
        while data := os.read(file, CHUNK):
            _say(DATA, data)
    finally:
        os.close(file)


def _write(path: str) -> None:
    """Takes all that the host says, also where it can't be written."""
    failure: OSError | None = None
    file, mode = -1, 0o644
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    try:
        with _parent(path, make=True) as (parent, name):
            with suppress(FileNotFoundError):  # a link, a pipe, a file with another name as well: gone first
                old = os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode
                os.unlink(name, dir_fd=parent)
                mode |= old & 0o111 if stat.S_ISREG(old) else 0  # it stays executable
            file = os.open(name, flags, mode, dir_fd=parent)
    except OSError as error:
        failure = error
    while True:
        kind, data = _hear()
        if kind == END:
            break
        try:
            while data and failure is None:
                data = data[os.write(file, data) :]
        except OSError as error:
            failure = error
    if file >= 0:
        os.close(file)
    if failure is not None:
        raise failure


@contextmanager
def _parent(path: str, *, make: bool) -> Iterator[tuple[int, str]]:
    """The folder that ``path`` lies in, and its name there; no link is followed."""
    *folders, name = path.split("/")
    _unlock()
    here = os.open(_WORK, _FOLDER)
    try:
        for part in folders:
            if make:
                with suppress(FileExistsError):
                    os.mkdir(part, 0o755, dir_fd=here)
            inner = os.open(part, _FOLDER, dir_fd=here)
            os.close(here)
            here = inner
        yield here, name
    finally:
        os.close(here)


if __name__ == "__main__":
    serve()
