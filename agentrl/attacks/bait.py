"""What a self-check plants on the host, for attacks to be seen by: secrets, services,
    folders that are watched.

Nothing here reaches into a sandbox; an attack learns where the baits lie, never what they say.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agentrl.sandboxing.private import private_folders

__all__ = ["Bait", "baited", "children", "containers", "count_descriptors", "leftovers", "processes_marked"]

_SECRET = "agentrl-secret-"  # begins every secret
_HOME_FILES = (".ssh/id_rsa", ".aws/credentials", ".cache/huggingface/token", ".netrc")
_WATCHED = ("/tmp", "/var/tmp", "/dev/shm", "/run", "/")
_CGROUPS = Path("/sys/fs/cgroup")


@dataclass(slots=True)
class Bait:
    """What was planted, and who came."""

    secret: str
    home: Path
    port: int  # TCP and UDP, on every address of the host
    abstract: str  # name of a Unix socket without a path
    visits: list[str] = field(default_factory=list)  # of connections and datagrams

    @property
    def facts(self) -> Mapping[str, Any]:
        """What attacks are told: places, no secrets."""
        namespace = Path("/proc/self/ns/pid")
        return {
            "host_pid": os.getpid(),
            "host_command": Path("/proc/self/cmdline").read_text(encoding="utf-8", errors="replace"),
            "pid_namespace": os.readlink(namespace) if namespace.is_symlink() else "",
            "home": str(self.home),
            "socket": str(self.home / "socket"),
            "paths": {path: _identity(path) for path in private_folders()},
            "port": self.port,
            "free_port": _free_port(),
            "abstract": self.abstract,
            "addresses": _addresses(),
            "secret_begins": _SECRET,
        }

    def missing(self) -> list[str]:
        """What is no longer as it was planted."""
        changed = []
        for name in _HOME_FILES:
            path = self.home / name
            if not path.is_file() or path.read_text(encoding="utf-8") != self.secret:
                changed.append(f"{name} changed")
        known = {Path(name).parts[0] for name in _HOME_FILES} | {"socket"}
        return changed + [f"{name} is new" for name in sorted({*os.listdir(self.home)} - known)]


@contextlib.contextmanager
def baited() -> Iterator[Bait]:
    """Plant baits and serve on them; removed at the end. Also a variable of this process's environment."""
    secret = _SECRET + secrets.token_hex(16)
    home = Path(tempfile.mkdtemp(prefix="agentrl-bait-"))
    home.chmod(0o755)  # so that only the sandbox is in the way
    for name in _HOME_FILES:
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(secret, encoding="utf-8")
    before = os.environ.get("AGENTRL_BAIT")
    os.environ["AGENTRL_BAIT"] = secret
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, home, ignore_errors=True)
        stack.callback(_restore, "AGENTRL_BAIT", before)
        bait = Bait(secret, home, 0, "agentrl-bait-" + secrets.token_hex(6))
        stop = threading.Event()
        servers = _servers(bait, stack)
        # What this process adds to its environment is not seen in /proc; what a new one begins with is.
        bystander = subprocess.Popen(["sleep", "86400"], env={**os.environ, "AGENTRL_BAIT": secret})
        stack.callback(bystander.wait)
        stack.callback(bystander.kill)
        threads = [
            threading.Thread(target=_serve, args=(server, bait, stop), name="bait") for server in servers
        ]
        for thread in threads:
            thread.start()
        try:
            yield bait
        finally:
            stop.set()
            for thread in threads:
                thread.join()


def _identity(path: str) -> list[int]:
    """By which a folder is known wherever it is seen."""
    status = os.stat(path)
    return [status.st_dev, status.st_ino]


def _restore(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


def _servers(bait: Bait, stack: contextlib.ExitStack) -> list[socket.socket]:
    """Sockets that wait on every way in."""
    tcp = stack.enter_context(socket.socket())
    tcp.bind(("0.0.0.0", 0))
    bait.port = tcp.getsockname()[1]
    udp = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    udp.bind(("0.0.0.0", bait.port))
    named, nameless = (stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(2))
    named.bind(str(bait.home / "socket"))
    (bait.home / "socket").chmod(0o777)
    nameless.bind("\0" + bait.abstract)
    servers = [tcp, udp, named, nameless]
    with contextlib.suppress(OSError):  # a host without IPv6
        tcp6 = stack.enter_context(socket.socket(socket.AF_INET6))
        tcp6.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        tcp6.bind(("::", bait.port))
        servers.append(tcp6)
    for server in servers:
        server.settimeout(0.1)
        if server.type == socket.SOCK_STREAM:
            server.listen()
    return servers


def _serve(server: socket.socket, bait: Bait, stop: threading.Event) -> None:
    while not stop.is_set():
        with contextlib.suppress(TimeoutError, ConnectionError):
            if server.type == socket.SOCK_DGRAM:
                _, address = server.recvfrom(100)
            else:
                client, address = server.accept()
                with client:
                    client.sendall(bait.secret.encode())
            bait.visits.append(f"{server.family.name} from {address!r}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _addresses() -> list[str]:
    """The host's own, where it has a route to somewhere."""
    found = []
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing
        found.append(probe.getsockname()[0])
    return found


def processes_marked(mark: str) -> list[int]:
    """Live processes of the host that have ``mark`` in their arguments or environment, ours excepted."""
    needle, found = mark.encode(), []
    for name in os.listdir("/proc"):
        if not name.isdecimal() or int(name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            folder = Path("/proc", name)
            is_zombie = ") Z" in (folder / "stat").read_text(encoding="utf-8", errors="replace")
            told = (folder / "cmdline").read_bytes() + (folder / "environ").read_bytes()
            if needle in told and not is_zombie:
                found.append(int(name))
    return found


def leftovers(word: str) -> frozenset[str]:
    """Paths of the host that have ``word`` in their name: in temporary folders, and among the cgroups."""
    found = {
        os.path.join(folder, name)
        for folder in _WATCHED
        if os.path.isdir(folder)
        for name in os.listdir(folder)
        if word in name
    }
    for folder, names, _ in os.walk(_CGROUPS):
        found |= {os.path.join(folder, name) for name in names if word in name}
    return frozenset(found)


def children() -> frozenset[int]:
    """Live processes below this one, however deep."""
    parents = {}
    for name in os.listdir("/proc"):
        if name.isdecimal():
            with contextlib.suppress(OSError):
                told = Path("/proc", name, "stat").read_bytes().rpartition(b")")[2].split()
                if told[0] != b"Z":
                    parents[int(name)] = int(told[1])
    found = {os.getpid()}
    while grown := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= grown
    return frozenset(found - {os.getpid()})


def containers() -> frozenset[str]:
    """Of the Docker engine's containers, those that carry a label of ours with this process's number."""
    if shutil.which("docker") is None:
        return frozenset()
    shown = '{{.ID}} {{.Label "agentrl.sandbox.owner"}}'
    command = ["docker", "ps", "--all", "--filter", "label=agentrl.sandbox.owner", "--format", shown]
    asked = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return frozenset(line for line in asked.stdout.splitlines() if f"-{os.getpid()}-" in line)


def count_descriptors() -> int:
    """Open descriptors of this process."""
    return len(os.listdir("/proc/self/fd"))
