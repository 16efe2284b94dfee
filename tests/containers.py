"""What the tests of the docker backend share: an engine's containers, seen through its command line."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from agentrl.registry import make_sandbox
from agentrl.sandbox import Backend, ExecResult, Limits, Sandbox

IMAGE = os.environ.get("AGENTRL_DOCKER_IMAGE", "agentrl-python:bookworm")
LIMITS = Limits(cpu_s=20, wall_s=60, memory_mib=128, pids=32, disk_mib=8, output_kib=16)


def changed(**changes: Any) -> Limits:
    """LIMITS, but for these."""
    return Limits(**{**{name: getattr(LIMITS, name) for name in Limits.__slots__}, **changes})


def docker_backend(**kwargs: Any) -> Backend:
    """One of the tests' image, which keeps nothing ready."""
    return make_sandbox("docker", **{"image": IMAGE, "pool": 0, **kwargs})


def run_python(sandbox: Sandbox, code: str, **changes: Any) -> ExecResult:
    """Run ``code``, with these limits lower."""
    return sandbox.run(["python3", "-c", code], limits=changed(**changes) if changes else None)


def said(sandbox: Sandbox, code: str) -> str:
    """What ``code`` prints."""
    result = run_python(sandbox, code)
    assert result.status == "ok", result
    return result.stdout.decode().strip()


def docker(*words: str) -> str:
    """What the command line says."""
    return subprocess.run(["docker", *words], capture_output=True, text=True, check=True, timeout=60).stdout


def containers(owner: int | None = None) -> list[str]:
    """Those of process ``owner``, this one by default, whatever their state."""
    return docker("ps", "-aq", "--filter", f"name=agentrl-{owner or os.getpid()}-").split()


def until(happened: Callable[[], bool], *, within_s: float = 30.0) -> bool:
    """Whether it happens in time."""
    end = time.monotonic() + within_s
    while not (found := happened()) and time.monotonic() < end:
        time.sleep(0.05)
    return found


class Gate:
    """A socket in ``folder`` that passes on to the engine until it is cut or frozen."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "engine.sock"
        self.reopen()

    def reopen(self) -> None:
        """As an engine that is started (again)."""
        self.path.unlink(missing_ok=True)
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(self.path))
        self._listening.listen(64)
        self._ends: list[socket.socket] = []
        self._is_open = threading.Event()
        self._is_open.set()
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def cut(self) -> None:
        """As an engine that is stopped."""
        with suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()  # it takes no more in, so all ends are known
        self._is_open.set()
        for end in self._ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for end in (*self._ends, self._listening):
            end.close()

    def freeze(self) -> None:
        """As an engine that hangs."""
        self._is_open.clear()

    def close(self) -> None:
        """Cut it, if it is not."""
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                ours, _ = self._listening.accept()
            except OSError:
                return
            theirs = socket.socket(socket.AF_UNIX)
            theirs.connect("/var/run/docker.sock")
            self._ends += [ours, theirs]
            for ends in ((ours, theirs), (theirs, ours)):
                thread = threading.Thread(target=self._pass_on, args=ends)
                thread.start()
                self._threads.append(thread)

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                self._is_open.wait()
                target.sendall(data)
        with suppress(OSError):
            target.shutdown(socket.SHUT_WR)
