"""A Docker engine as sandboxes need it: containers of one shape, their deaths, and what dead owners left.

Every call has a deadline. What the engine does wrong (an error, silence, a broken connection) is SandboxLost;
what it can never do (no such image, no such runtime) is BadConfig.
"""

from __future__ import annotations

import base64
import contextlib
import inspect
import itertools
import json
import math
import os
import random
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from agentrl.errors import BadConfig, MissingExtra
from agentrl.sandbox import Limits, SandboxLost
from agentrl.sandboxing import container_process
from agentrl.sandboxing.container_link import Link, LinkLost
from agentrl.sandboxing.container_meter import EngineMeter, Meter, host_meter
from agentrl.sandboxing.owners import is_gone, this_process
from agentrl.sandboxing.seccomp import deny_list

__all__ = ["Container", "Death", "Engine", "Shape"]

# Who ended a container: the kernel, because its memory ran out; something inside; or somebody outside.
Death = Literal["memory", "inside", "outside"]

_OWNER = "agentrl.sandbox.owner"  # labels
_BACKEND = "agentrl.sandbox.backend"
# A user for each container, since the kernel counts pipes, inotify and more for each user of the host. An
# engine in a user namespace of its own has 65,536 of them.
_UIDS, _MAPPED_UIDS = range(1 << 20, 1 << 30), range(1 << 12, 60_000)
_MIB = 1 << 20
_LEAST_DISK = 1 << 12  # bytes, a page; to the kernel 0 is no limit, as are 0 inodes
_LEAST_INODES = 16
_FILES = 1024  # open ones of a process
_INODES_PER_MIB = 256
_FIRST_PROCESS_PIDS = 1
_REMOVALS = 3
_MEMORY_REFUSED = ("unable to set memory limit", "device or resource busy")  # runc's words, and the kernel's
_GONE = (404, 409)  # removed, or being removed
_DEATH_S = 30.0  # for the engine to tell of it; its streams end earlier, on a busy machine by seconds
_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class Shape:
    """Of Limits what a container is made with."""

    memory_mib: int | None
    pids: int | None
    disk_mib: int | None
    network: bool

    @classmethod
    def of(cls, limits: Limits) -> Shape:
        """The shape of a session."""
        return cls(limits.memory_mib, limits.pids, limits.disk_mib, limits.network)


@dataclass(slots=True)
class Container:
    """A running one whose first process is ready."""

    id: str
    link: Link
    meter: Meter
    started: str  # on the engine's clock
    limits: tuple[int | None, int | None] | None  # memory in MiB and pids in force; None: not known


class Engine:
    """One engine, for one backend. Safe to use from many threads."""

    def __init__(self, base_url: str | None, *, image: str, runtime: str | None, patience_s: float) -> None:
        try:
            import docker
        except ImportError:
            raise MissingExtra(
                'the docker sandbox needs the docker SDK installed: pip install "agentrl-gym[docker]"'
            ) from None
        self._sdk = docker
        self._base_url, self._image, self._runtime = base_url, image, runtime
        self._patience_s = patience_s
        self._opened: Any = None
        self._opening = threading.Lock()
        self._uids: range | None = None
        self._unsure: set[str] = set()  # names of containers that may be there
        self._me = f"{_machine()}:{this_process()}"
        self._name = f"{os.getpid()}-{next(_numbers)}-{os.urandom(4).hex()}"

    # -- what it is --

    def info(self) -> Mapping[str, Any]:
        """What the engine says of itself. Raises SandboxLost."""
        with self._world("say what it is"):
            return dict(self._client.info())

    def can_be_reached(self) -> bool:
        """Whether it answers at all."""
        try:
            with self._world("answer"):
                self._client.ping()
        except SandboxLost:
            return False
        return True

    def check_image(self) -> None:
        """Raise BadConfig unless the image is there and can be used."""
        with self._world("look at an image"):
            try:
                image = self._client.inspect_image(self._image)
            except self._sdk.errors.ImageNotFound:
                raise BadConfig(
                    f"the engine has no image {self._image!r}: docker pull {self._image}, or name another "
                    "that has python3 as image= or in AGENTRL_DOCKER_IMAGE"
                ) from None
        if image["Config"].get("Volumes"):
            raise BadConfig(
                f"the image {self._image!r} declares volumes ({', '.join(image['Config']['Volumes'])}), "
                "whose size has no limit: take one without"
            )

    # -- containers --

    def create(self, shape: Shape) -> Container:
        """A container that waits for its first command. Raises SandboxLost and BadConfig."""
        name = f"agentrl-{self._name}-{next(_numbers)}"
        try:
            container = self._create(name, shape)
        except BaseException:
            self._unsure.add(name)
            self._remove_unsure()
            raise
        self._remove_unsure()
        return container

    def _remove_unsure(self) -> None:
        """Remove what the engine may have made although it did not say so, as soon as it answers again."""
        with contextlib.suppress(SandboxLost):
            for name in list(self._unsure):
                self.remove(name)
                self._unsure.discard(name)

    def _create(self, name: str, shape: Shape) -> Container:
        uid = self._fresh_uid()
        with self._world("make a container"):
            client = self._client
            client.create_container(
                self._image,
                name=name,
                entrypoint=["python3", "-I", "-S", "-c", inspect.getsource(container_process)],
                command=[_filters()],
                hostname="sandbox",
                user=f"{uid}:{uid}",
                working_dir="/work",
                stdin_open=True,
                labels={_OWNER: self._me, _BACKEND: self._name},
                healthcheck={"test": ["NONE"]},
                host_config=self._host_config(shape, uid=uid),
            )
            # Before the start, so that nothing is missed. When this connection ends, so does the stdin of the
            # first process.
            stream = client.attach_socket(name, params={"stdin": 1, "stdout": 1, "stderr": 1, "stream": 1})
            link = Link(getattr(stream, "_sock", stream), owner=stream)
        try:
            with self._world("start a container"):
                self._client.start(name)
                link.hear((container_process.READY,), within_s=self._patience_s)
                found = self._client.inspect_container(name)
        except BaseException as error:
            link.close()
            if link.complaint or "executable file not found" in str(error):
                raise BadConfig(
                    f"the image {self._image!r} can't run a sandbox's first process, which needs python3 of "
                    f"3.8 or later with ctypes: {link.complaint.decode(errors='replace') or error}"
                ) from error
            raise
        return Container(
            id=found["Id"],
            link=link,
            meter=host_meter(found["State"]["Pid"], found["Id"]) or self._engine_meter(found),
            started=found["State"]["StartedAt"],
            limits=(shape.memory_mib, shape.pids),
        )

    def _fresh_uid(self) -> int:
        if self._uids is None:
            kinds = " ".join(self.info().get("SecurityOptions") or ())
            is_mapped = "name=rootless" in kinds or "name=userns" in kinds
            self._uids = _MAPPED_UIDS if is_mapped else _UIDS
        return random.SystemRandom().choice(self._uids)

    def _host_config(self, shape: Shape, *, uid: int) -> Any:
        disk, size = None, ""
        if shape.disk_mib is not None:
            disk = max(math.ceil(shape.disk_mib * _MIB), _LEAST_DISK)
            inodes = max(math.ceil(shape.disk_mib * _INODES_PER_MIB), _LEAST_INODES)
            size = f",size={disk},nr_inodes={inodes}"
        options = f"rw,exec,nosuid,nodev,mode=0700,uid={uid},gid={uid}{size}"
        memory = math.ceil(shape.memory_mib * _MIB) if shape.memory_mib is not None else None
        Ulimit = self._sdk.types.Ulimit
        return self._client.create_host_config(
            auto_remove=True,  # also where nobody is left to do it
            cap_drop=["ALL"],
            cgroupns="private",
            ipc_mode="private",
            log_config={"Type": "none"},
            mem_limit=memory,
            memswap_limit=memory,
            network_mode=None if shape.network else "none",
            oom_score_adj=1000,
            pids_limit=int(shape.pids) + _FIRST_PROCESS_PIDS if shape.pids is not None else None,
            read_only=True,
            runtime=self._runtime,
            security_opt=["no-new-privileges:true"],
            shm_size=disk,
            tmpfs={"/work": options, "/tmp": options},
            ulimits=[
                Ulimit(name="nofile", soft=_FILES, hard=_FILES),
                Ulimit(name="core", soft=0, hard=0),
            ],
        )

    def update(self, container: Container, *, memory_mib: int | None, pids: int | None) -> bool:
        """Set other limits; False where more is in use than that."""
        if container.limits == (memory_mib, pids):
            return True
        container.limits = None  # until the engine has answered
        memory = math.ceil(memory_mib * _MIB) if memory_mib is not None else -1
        wanted = {
            "Memory": memory,
            "MemorySwap": memory,
            "PidsLimit": int(pids) + _FIRST_PROCESS_PIDS if pids is not None else -1,
        }
        with self._world("set limits"):
            place = f"{self._client.base_url}/v{self._client.api_version}/containers/{container.id}/update"
            answer = self._client.post(place, json=wanted, timeout=self._patience_s)
            if answer.status_code == 500 and any(words in answer.text for words in _MEMORY_REFUSED):
                return False
            answer.raise_for_status()
        container.limits = (memory_mib, pids)
        return True

    def remove(self, name: str) -> None:
        """Kill and remove it; nothing happens to one that is gone. Raises SandboxLost."""
        with self._world("remove a container"):
            for attempt in range(1, _REMOVALS + 1):
                try:
                    self._client.remove_container(name, force=True, v=True)
                    return
                except self._sdk.errors.APIError as error:
                    if error.status_code in _GONE:
                        return
                    # A busy engine says after ten seconds that it has not seen the end of what it killed.
                    if error.status_code != 500 or attempt == _REMOVALS:
                        raise

    def death(self, container: Container) -> Death | None:
        """Who ended it; None where it lives. Raises SandboxLost where the engine does not know."""
        until = time.monotonic() + _DEATH_S
        is_listed = True
        while True:
            seen = self._events(container.id, container.started, ("oom", "kill", "die"))
            if "die" in seen:
                break
            if not is_listed:
                raise SandboxLost("a container is gone, and the engine does not know why")
            if time.monotonic() >= until:
                return None
            time.sleep(0.05)
            with self._world("find a container"):
                is_listed = any(self._client.containers(all=True, filters={"id": container.id}))
        if "kill" in seen:
            return "outside"
        return "memory" if "oom" in seen else "inside"

    def _events(self, container: str, since: str, kinds: tuple[str, ...]) -> list[str]:
        with self._world("tell its events"):
            found = self._client.events(
                since=_seconds(since),
                until=_seconds(self._client.info()["SystemTime"]),  # its clock may differ from ours
                filters={"container": container, "event": list(kinds)},
                decode=True,
            )
            return [event["status"] for event in found]

    def _engine_meter(self, found: Mapping[str, Any]) -> EngineMeter:
        name, started = found["Id"], found["State"]["StartedAt"]

        def statistics() -> Mapping[str, Any]:
            with self._world("measure a container"):
                place = f"{self._client.base_url}/v{self._client.api_version}/containers/{name}/stats"
                once = {"stream": "false", "one-shot": "true"}
                answer = self._client.get(place, params=once, timeout=self._patience_s)
                answer.raise_for_status()
                return dict(answer.json())

        return EngineMeter(statistics, lambda: len(self._events(name, started, ("oom",))))

    # -- what is left --

    def left(self) -> list[str]:
        """Ids of this backend's containers that are there."""
        with self._world("list containers"):
            found = self._client.containers(all=True, filters={"label": f"{_BACKEND}={self._name}"})
        return [container["Id"] for container in found]

    def sweep(self) -> int:
        """Remove what processes of this machine left that are gone; how many containers."""
        with self._world("list containers"):
            found = self._client.containers(all=True, filters={"label": _OWNER})
        orphans = [container["Id"] for container in found if _is_orphan(container["Labels"][_OWNER])]
        for orphan in orphans:
            self.remove(orphan)
        return len(orphans)

    def close(self) -> None:
        """Hang up."""
        if self._opened is not None:
            self._opened.close()

    @property
    def _client(self) -> Any:
        with self._opening:
            if self._opened is None:
                where = {"base_url": self._base_url} if self._base_url else self._sdk.utils.kwargs_from_env()
                self._opened = self._sdk.APIClient(**where, version="auto", timeout=self._patience_s)
            return self._opened

    @contextmanager
    def _world(self, doing: str) -> Iterator[None]:
        """What goes wrong with the engine is the world's."""
        import requests
        import urllib3

        broken = (
            self._sdk.errors.DockerException,
            requests.exceptions.RequestException,
            urllib3.exceptions.HTTPError,
            OSError,
            json.JSONDecodeError,
            LinkLost,
        )
        try:
            yield
        except broken as error:
            raise SandboxLost(
                f"the Docker engine could not {doing}: {error}; see that it runs: docker info"
            ) from error


def _seconds(moment: str) -> str:
    """2026-01-02T03:04:05.678901234Z as seconds since 1970, as the engine wants it."""
    from datetime import datetime

    whole, _, rest = moment.partition(".")
    digits = rest.rstrip("Z")[:9] or "0"
    return f"{int(datetime.fromisoformat(whole.rstrip('Z') + '+00:00').timestamp())}.{digits}"


def _machine() -> str:
    """This one since it started: the numbers of processes mean nothing to another that uses the engine."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _is_orphan(owner: str) -> bool:
    """Whether the process of that label lived on this machine and does no longer."""
    machine, _, mark = owner.partition(":")
    return machine == _machine() and is_gone(mark)


def _filters() -> str:
    """System call filters for the machines that an engine may run on, as the first process takes them."""
    known = {machine: deny_list(machine) for machine in ("x86_64", "aarch64")}
    return json.dumps(
        {machine: base64.b64encode(program or b"").decode() for machine, program in known.items()}
    )
