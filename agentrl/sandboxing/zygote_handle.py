"""The host's side of one zygote: start it, have it make sessions and runs, notice when it is gone.

Covered: a zygote has no variable and no descriptor of this process's, and ends when it does, whatever ends
it; all that a zygote has started ends with the zygote. Requests may come from many threads.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from agentrl.sandbox import SandboxLost
from agentrl.sandboxing.inherited import keep, release
from agentrl.sandboxing.private import private_folders

__all__ = ["ZygoteHandle", "ZygoteSettings"]

_ANSWER_S = 60.0  # for a fork; a machine may be very busy
_END_S = 10.0  # for a zygote to end after its socket
_MOST_MESSAGE = 4096  # bytes of an answer

_MODULES = ("zygote_process", "zygote_python")  # in this order
# Descriptor 0 is the socket; the rest of what it does comes from there.
_BOOT = """
import json, os, sys, types
setup = json.loads(os.read(0, 1 << 20))
for name, text in setup["sources"].items():
    sys.modules[name] = types.ModuleType(name)
    exec(compile(text, name, "exec"), sys.modules[name].__dict__)
import zygote_process, zygote_python
argv = zygote_process.live(setup)
del setup, text, name
zygote_python.become(argv)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ZygoteSettings:
    """What a zygote is made with."""

    preload: Sequence[str]  # modules that are imported already when a command's Python begins
    packages: Sequence[str]  # folders of the host with packages that commands may import
    seccomp: bytes  # a filter's program; b"": none


class ZygoteHandle:
    """A zygote, started by the constructor. Raises SandboxLost where it can't start, with its reason."""

    def __init__(self, settings: ZygoteSettings) -> None:
        self._lock = threading.Lock()
        self._is_lost = False
        try:
            self._socket, self._process = _start()
        except OSError as error:
            raise SandboxLost(f"no zygote starts: {error}") from error
        keep(self._socket.fileno())
        setup = {
            "sources": _sources(),
            "preload": list(settings.preload),
            "packages": [os.path.realpath(folder) for folder in settings.packages],
            "hidden": private_folders(),
            "seccomp": settings.seccomp.hex(),
        }
        host = -1
        try:
            host = os.pidfd_open(os.getpid())
            self._socket.send(json.dumps(setup).encode())
            self._ask({}, [host])
        except (OSError, SandboxLost) as error:
            self.close()
            raise SandboxLost(f"no zygote starts: {error}") from None
        finally:
            if host >= 0:
                os.close(host)

    @property
    def pid(self) -> int:
        """The zygote's."""
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """Whether it can be asked for anything."""
        return not self._is_lost and self._process.poll() is None

    def open_session(self, number: int, *, uid: int, options: str) -> int:
        """A descriptor of the folder that has a new session's "work". Raises SandboxLost."""
        return self._ask_for({"do": "open", "session": number, "uid": uid, "options": options}, ())

    def close_session(self, number: int) -> None:
        """Forget a session; where the zygote is gone, it is forgotten already."""
        with self._lock, suppress(OSError):
            self._socket.send(json.dumps({"do": "close", "session": number}).encode())

    def start(self, number: int, descriptors: Sequence[int], *, uid: int, options: str) -> int:
        """Fork a run of a session; a pidfd of its init, with whose end the run has none left.

        ``descriptors``: the command, its three streams, its status and its control groups, as
        ``zygote_process.Run`` has them. Raises SandboxLost.
        """
        request = {"do": "run", "session": number, "uid": uid, "temporary": options}
        return self._ask_for(request, descriptors)

    def close(self) -> None:
        """End it and with it all of its runs. Idempotent."""
        self._is_lost = True
        if self._socket.fileno() >= 0:
            release(self._socket.fileno())
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)  # whoever else has it
            self._socket.close()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _ask_for(self, request: Mapping[str, object], descriptors: Sequence[int]) -> int:
        answer = self._ask(request, descriptors)
        if not answer:  # this process has no room for it, and what it stands for is out of reach
            self._give_up()
            raise SandboxLost("a zygote answered without a descriptor: raise the limit of open files")
        return answer[0]

    def _give_up(self) -> None:
        """End it, and with it what it began: what it says from now on may answer an earlier question."""
        self._is_lost = True
        self._process.kill()

    def _ask(self, request: Mapping[str, object], descriptors: Sequence[int]) -> list[int]:
        """The descriptors of its answer."""
        with self._lock:
            if self._is_lost:  # what it says now may answer an earlier question
                raise SandboxLost("the zygote is lost")
            try:
                socket.send_fds(self._socket, [json.dumps(request).encode()], descriptors)
                answer, received, _, _ = socket.recv_fds(
                    self._socket, _MOST_MESSAGE, 1, socket.MSG_CMSG_CLOEXEC
                )
            except OSError as error:  # a time-out, say
                self._give_up()
                raise SandboxLost(f"the zygote does not answer: {error}") from error
            except BaseException:  # a signal's handler raised
                self._give_up()
                raise
        if answer == b"ok":
            return received
        if not answer:
            self._give_up()
            raise SandboxLost("the zygote died")
        raise SandboxLost(answer.decode(errors="replace"))


def _start() -> tuple[socket.socket, subprocess.Popen[bytes]]:
    """Our end of its socket, and the process. Raises OSError."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(_ANSWER_S)
    python = _python()
    try:
        with theirs:
            process = subprocess.Popen(
                [python, "-I", "-S", "-c", _BOOT],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                env=_environment(python),
                start_new_session=True,
            )
    except OSError:
        ours.close()
        raise
    return ours, process


@cache
def _sources() -> dict[str, str]:
    folder = Path(__file__).parent
    return {name: (folder / f"{name}.py").read_text("utf-8") for name in _MODULES}


def _python() -> str:
    """The interpreter that this one, perhaps of a virtual environment, was made from."""
    return getattr(sys, "_base_executable", None) or sys.executable


def _environment(python: str) -> dict[str, str]:
    """A zygote's, and therefore each command's."""
    folders = dict.fromkeys((os.path.dirname(python), "/usr/local/bin", "/usr/bin", "/bin"))
    return {"PATH": ":".join(folders), "HOME": "/work", "TMPDIR": "/tmp", "LANG": "C.UTF-8"}
