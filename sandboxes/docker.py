"""Containers of a Docker engine, each for one session: made when asked for, or ready before.

Covered: everything of ``agentrl.sandbox``, by way of namespaces, cgroups, no network, a read-only root, sized
tmpfs, no capability and an uid of its own without rights. Files persist from run to run, because the
container stays; its first process is ours (``agentrl.sandboxing.container_process``) and starts each run, so
that a run costs a fork and no ``docker exec``. What a run leaves is killed by that process, which the
policy's code can neither signal nor trace; where it does not answer, the container is killed through the
engine and the session goes on with an empty one. A policy's code that brings its own container down has
failed; it never counts as the world's failure. An engine that goes away always does, and so does a signal's
handler that raises while a container's answer is awaited.

Not covered: faults of the kernel, unless the engine has gVisor (``runtime="runsc"``); a disk limit lower than
the session's for a single run, which is refused.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from agentrl.errors import BadConfig
from agentrl.sandbox import (
    ExecResult,
    Fault,
    Limits,
    SandboxLost,
    Status,
    Survey,
    Talk,
    check_command,
    check_enforced,
    check_path,
    lowered,
)
from agentrl.sandboxing.container_engine import Container, Death, Engine, Shape
from agentrl.sandboxing.container_link import Conversation, LinkClock, LinkLost
from agentrl.sandboxing.container_meter import Usage
from agentrl.sandboxing.container_pool import Crew, Pool
from agentrl.sandboxing.pump import outcome, overfull, refused
from agentrl.sandboxing.turns import Turn

__all__ = ["Docker"]

_IMAGE = "python:3.11-slim"
_LEAST_MEMORY_MIB = 16  # the first process has some ten of them
_CLOSE_S = 60.0
_OUTAGE_POLL_S = 0.5
_ANSWER_S = 60.0  # for the first process of a container, when no command runs
_ENFORCED = {
    "cpu_s": "read from its cgroup every 20 ms; of an engine elsewhere, from its statistics",
    "wall_s": "SIGKILL to all of the container",
    "memory_mib": "memory cgroup, without swap",
    "pids": "pids cgroup",
    "disk_mib": "read-only root; /work, /tmp and /dev/shm are tmpfs of that size",
    "output_kib": "counted as it is read",
    "files": "mount namespace, read-only root of the image",
    "processes": "PID namespace, one container for each session",
    "privileges": "an uid of its own, no capability, no-new-privileges, seccomp",
    "network": "network namespace with nothing in it",
    "environment": "PID namespace; none of the host's variables is passed on",
    "survivors": "the PID namespace is emptied after each run, and ends with the session",
}


class Docker:
    """Opens sandboxes in containers.

    ``image``: one with python3; by default that of the environment variable AGENTRL_DOCKER_IMAGE, else
    python:3.11-slim. ``pool``: containers kept ready for each kind of session that was asked for; 0: none.
    ``runtime``: "runsc" for gVisor. ``base_url``: of the engine; by default what DOCKER_HOST says.
    ``patience_s``: for one answer of the engine; on an overloaded machine one took 15 seconds. ``outage_s``:
    how long a session waits for an engine that can't be reached, as when it is restarted, before it is lost;
    less than ``rollout.deadline_s``.
    """

    name = "docker"

    def __init__(
        self,
        *,
        image: str | None = None,
        runtime: str | None = None,
        pool: int = 2,
        base_url: str | None = None,
        patience_s: float = 120.0,
        outage_s: float = 45.0,
    ) -> None:
        if isinstance(pool, bool) or not 0 <= pool <= 1000:
            raise BadConfig(f"Docker(pool={pool!r}): it is a number of containers, 0 to 1000")
        self._image = image or os.environ.get("AGENTRL_DOCKER_IMAGE") or _IMAGE
        self._runtime = runtime
        self._engine = Engine(base_url, image=self._image, runtime=runtime, patience_s=patience_s)
        self._outage_s = outage_s
        self._crew = Crew(at_once=max(os.cpu_count() or 1, 2))
        self._pool = Pool(self._engine, self._crew, size=pool)
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._survey: Survey | None = None
        self._is_swept = False
        self._closing = threading.Event()
        self._open: set[_Session] = set()

    def survey(self) -> Survey:
        """What the engine enforces here."""
        with self._lock:
            if self._survey is None:
                survey = self._look()
                if not survey.available:
                    return survey  # it may be started yet
                self._survey = survey
            return self._survey

    def _look(self) -> Survey:
        try:
            info = self._engine.info()
            self._engine.check_image()
        except (SandboxLost, BadConfig) as error:
            return Survey(available=False, note=str(error))
        if self._runtime is not None and self._runtime not in info["Runtimes"]:
            return Survey(
                available=False,
                note=f"the engine has no runtime {self._runtime!r}, only {', '.join(info['Runtimes'])}: "
                "install gVisor (https://gvisor.dev/docs/user_guide/install/) and run 'runsc install', or "
                "leave it out",
            )
        missing = {}
        for limit, able in (("memory_mib", "MemoryLimit"), ("pids", "PidsLimit")):
            if not info.get(able):
                missing[limit] = "the engine has no such cgroup: give it the controllers memory and pids"
        return Survey(
            available=True,
            enforced={what: how for what, how in _ENFORCED.items() if what not in missing},
            missing=missing,
            note=f"Docker {info['ServerVersion']}, {self._runtime or info['DefaultRuntime']}, {self._image}",
        )

    def open(self, limits: Limits) -> _Session:
        """A session in a container of its own."""
        if self._process != os.getpid():
            raise BadConfig("this docker backend was made in another process: make one in each")
        check_enforced(self.name, self.survey(), limits)
        if limits.memory_mib is not None and limits.memory_mib < _LEAST_MEMORY_MIB:
            raise BadConfig(
                f"the sandbox 'docker' can't do with memory_mib={limits.memory_mib}: give it "
                f"{_LEAST_MEMORY_MIB} or more"
            )
        with self._lock:
            is_swept, self._is_swept = self._is_swept, True
        if not is_swept:
            self.sweep()
        session = self._make(limits)
        with self._lock:
            self._open.add(session)
            is_closed = self._closing.is_set()
        if is_closed:  # meanwhile
            session.close()
            raise SandboxLost("this docker backend is closed: make another")
        return session

    def _make(self, limits: Limits) -> _Session:
        """A session, once the engine can be reached. Raises SandboxLost."""
        until = time.monotonic() + self._outage_s
        was_away = False
        while True:
            try:
                return _Session(self._engine, self._pool, limits, on_close=self._forget)
            except SandboxLost:
                is_away = not self._engine.can_be_reached()
                if self._closing.is_set() or time.monotonic() >= until or not (is_away or was_away):
                    raise
                was_away = is_away
            if is_away:
                self._closing.wait(_OUTAGE_POLL_S)

    def sweep(self) -> int:
        """Remove containers whose owner, a process of this machine, is gone."""
        return self._engine.sweep()

    def close(self) -> None:
        """Close every session, remove what is ready, and wait until nothing is left."""
        with self._lock:
            self._closing.set()
            sessions = list(self._open)
        self._pool.close()
        for session in sessions:
            session.close()
        until = time.monotonic() + _CLOSE_S
        self._crew.join(until)
        try:
            while (left := self._engine.left()) and time.monotonic() < until:
                for container in left:
                    self._engine.remove(container)
                time.sleep(0.02)
        except SandboxLost:
            pass  # the engine is gone, and sweeps when it is back
        self._engine.close()

    def _forget(self, session: _Session) -> None:
        with self._lock:
            self._open.discard(session)


class _Session:
    """A container, and one command in it at a time."""

    def __init__(
        self, engine: Engine, pool: Pool, limits: Limits, *, on_close: Callable[[_Session], None]
    ) -> None:
        self._engine, self._pool, self._limits = engine, pool, limits
        self._on_close = on_close
        self._closing = threading.Event()
        self._running = Turn()
        asked = time.monotonic()
        self._container: Container | None = pool.take(Shape.of(limits))
        self._is_lost = False  # by the world, or while it is not known how what began will end
        self._waited_s = time.monotonic() - asked  # for the container: of the first run's time in the queue

    def run(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes | Talk = b"",
        files: Mapping[str, bytes] | None = None,
        limits: Limits | None = None,
    ) -> ExecResult:
        """See :class:`agentrl.sandbox.Sandbox`."""
        check_command(argv, stdin)
        allowed = lowered(self._limits, limits)
        for path in files or ():
            check_path(path)
        asked = time.monotonic()
        with self._running:
            waited_s, self._waited_s = self._waited_s, 0.0
            container = self._standing()
            try:
                for path, data in (files or {}).items():
                    self._write(container, path, data)
            except OSError as error:  # what lies there, or how much, is the code's own doing
                if self._is_torn():
                    raise
                return refused(f"a file can't be written: {error}")
            container = self._standing()
            if not self._engine.update(container, memory_mib=allowed.memory_mib, pids=allowed.pids):
                return overfull()
            return self._hold(container, argv, stdin=stdin, limits=allowed, asked=asked - waited_s)

    def read(self, path: str, *, most_bytes: int = 1 << 20) -> bytes:
        """See :class:`agentrl.sandbox.Sandbox`."""
        check_path(path)
        with self._running:
            container = self._standing()
            try:
                return container.link.read(path, most_bytes=most_bytes, within_s=_ANSWER_S)
            except LinkLost:
                self._bury(container)
                raise FileNotFoundError(errno.ENOENT, "the container of that file is gone", path) from None

    def write(self, path: str, data: bytes) -> None:
        """See :class:`agentrl.sandbox.Sandbox`."""
        check_path(path)
        with self._running:
            self._write(self._standing(), path, data)

    def close(self) -> None:
        """End what runs; the container goes with its connection, and is removed in the background."""
        self._closing.set()
        with self._running:
            if self._container is not None:
                self._pool.leave(self._container)
                self._container = None
        self._on_close(self)

    def _standing(self) -> Container:
        """The session's container; an empty one where the policy's code brought the last down."""
        if self._closing.is_set():
            raise SandboxLost("this sandbox is closed: open another")
        if self._is_lost or self._is_torn():
            raise SandboxLost("the container of this sandbox was lost: open another")
        if self._container is None:
            self._container = self._pool.take(Shape.of(self._limits))
        return self._container

    def _is_torn(self) -> bool:
        """Whether an exception, as of a signal's handler, came between a question and its answer."""
        return self._container is not None and self._container.link.is_torn

    def _write(self, container: Container, path: str, data: bytes) -> None:
        try:
            container.link.write(path, data, within_s=_ANSWER_S)
        except LinkLost:
            self._bury(container)
            raise OSError(errno.ENOSPC, "the container had no memory left for that file", path) from None

    def _hold(
        self, container: Container, argv: Sequence[str], *, stdin: bytes | Talk, limits: Limits, asked: float
    ) -> ExecResult:
        death: Death | None = None
        is_cut = True  # by an exception
        with container.meter.watching() as before:
            self._is_lost = True  # unless what follows comes to its end
            clock = LinkClock(lambda: container.meter.cpu_s() - before.cpu_s, self._closing)
            conversation = Conversation(container.link, clock, limits)
            try:
                conversation.hold(argv, stdin=stdin, within_s=_ANSWER_S)
                is_cut = container.link.is_torn
            finally:
                conversation.finish()
                if conversation.is_dead:
                    self._is_lost = False
                else:
                    death = self._put_down(container, is_silent=conversation.lost is None, is_cut=is_cut)
        if death == "outside" and not conversation.began:
            raise SandboxLost(f"the container was lost before the command began: {conversation.lost}")
        try:
            after = container.meter.usage() if death is None else before
        except SandboxLost:
            death, after = self._put_down(container, is_silent=False), before
        return _result(
            conversation,
            death,
            limits=limits,
            queue_ms=((conversation.began or time.monotonic()) - asked) * 1000,
            used=Usage(
                max(after.cpu_s - before.cpu_s, conversation.cpu_s),
                after.peak_bytes,
                after.memory_kills - before.memory_kills,
                after.pids_hits - before.pids_hits,
            ),
        )

    def _put_down(self, container: Container, *, is_silent: bool, is_cut: bool = False) -> Death:
        """Kill what can't be asked to do it, or is dead already; who brought that about."""
        self._container, self._is_lost = None, True
        try:
            if is_silent:  # starved by what runs beside it
                self._engine.remove(container.id)
                death: Death = "outside" if is_cut else "inside"
            else:
                death = self._engine.death(container) or "outside"
            self._is_lost = death == "outside"
        except SandboxLost:
            death = "outside"
        finally:
            self._pool.leave(container)
        return death

    def _bury(self, container: Container) -> None:
        """Go on without a container that the policy's code ruined. Raises SandboxLost where the world did."""
        if self._put_down(container, is_silent=False) == "outside":
            raise SandboxLost("the container of this sandbox was lost: open another")


def _result(
    conversation: Conversation, death: Death | None, *, limits: Limits, queue_ms: float, used: Usage
) -> ExecResult:
    pumped, code = conversation.pumped, conversation.exit_code
    status, fault = _outcome(conversation, death, limits=limits, used=used)
    flags = {"pids_hit": used.pids_hits > 0, "container_died": death is not None and status != "lost"}
    is_own_end = status in ("ok", "error", "signal") and code is not None
    return ExecResult(
        status=status,
        fault=fault,
        exit_code=code if is_own_end and code is not None and code >= 0 else None,
        signal=-code
        if is_own_end and code is not None and code < 0
        else None
        if is_own_end
        else int(signal.SIGKILL),
        stdout=pumped.stdout.data,
        stderr=pumped.stderr.data,
        truncated=pumped.stdout.dropped + pumped.stderr.dropped,
        cpu_ms=used.cpu_s * 1000,
        wall_ms=pumped.wall_s * 1000,
        queue_ms=queue_ms,
        peak_bytes=used.peak_bytes,
        flags=tuple(flag for flag, is_up in flags.items() if is_up),
    )


def _outcome(
    conversation: Conversation, death: Death | None, *, limits: Limits, used: Usage
) -> tuple[Status, Fault]:
    end, code = conversation.pumped.end, conversation.exit_code
    if death == "outside" or end == "closed":
        return "lost", "world"
    if death == "memory" or used.memory_kills:
        return "memory", "policy"
    if end in ("exit", "talked") and limits.cpu_s is not None and used.cpu_s >= limits.cpu_s:
        return "cpu", "policy"  # between two looks
    if code is None and end == "exit":  # it ended its container
        return "signal", "policy"
    return outcome(end, code or 0)
