"""What is seen inside of bubblewrap, and the arguments that make it so."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from agentrl.sandboxing.bwrap_process import FILTER, STATUS
from agentrl.sandboxing.private import hidden_in

__all__ = ["UID", "Programs", "View", "arguments_for", "find_programs", "make_etc"]

UID = 65534  # inside, of user and group; outside it is another
_ANSWER_S = 20.0  # for bubblewrap to say what it is
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
    version: str
    can_disable_userns: bool


def find_programs() -> Programs | str:
    """What is installed, or what to install."""
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        return "bubblewrap is not installed: apt install bubblewrap, or dnf install bubblewrap"
    answers = [
        subprocess.run([bwrap, option], capture_output=True, text=True, timeout=_ANSWER_S, check=False)
        for option in ("--help", "--version")
    ]
    flags, version = answers[0].stdout + answers[0].stderr, answers[1].stdout.strip()
    for flag in ("--clearenv", "--size", "--perms", "--json-status-fd", "--as-pid-1"):
        if flag not in flags:
            return f"{version} has no {flag}: install bubblewrap 0.5 or newer"
    return Programs(bwrap, version, "--disable-userns" in flags)


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
    folders: tuple[str, ...]  # of the host, read-only, beside /usr
    hidden: tuple[str, ...]  # of the host, wherever they lie
    nothing: Path  # an empty folder, in their place
    path: str
    size_mib: float | None  # of /tmp and of /dev/shm
    network: bool


@functools.lru_cache(maxsize=1024)
def arguments_for(programs: Programs, view: View, *, is_filtered: bool) -> bytes:
    """What bubblewrap reads from descriptor ``ARGUMENTS``."""
    sized = [] if view.size_mib is None else ["--size", str(max(int(view.size_mib * 2**20), 4096))]
    environment = {"PATH": view.path, "HOME": "/work", "TMPDIR": "/tmp", "LANG": "C.UTF-8"}
    arguments = [
        *("--unshare-all", "--unshare-user", "--uid", str(UID), "--gid", str(UID)),
        *(["--share-net"] if view.network else []),
        *(["--disable-userns"] if programs.can_disable_userns else ["--as-pid-1"]),
        *("--hostname", "sandbox", "--cap-drop", "ALL", "--new-session", "--die-with-parent"),
        "--clearenv",
        *(word for name, value in environment.items() for word in ("--setenv", name, value)),
        *_system(view),
        *(
            "--proc",
            "/proc",
            "--ro-bind",
            "/proc/sys",
            "/proc/sys",
            "--tmpfs",
            "/proc/1",
            "--remount-ro",
            "/proc/1",
            "--dev",
            "/dev",
        ),
        *("--perms", "1777", *sized, "--tmpfs", "/dev/shm", "--remount-ro", "/dev"),
        *("--perms", "1777", *sized, "--tmpfs", "/tmp"),
        *("--bind", str(view.work), "/work", "--chdir", "/work", "--remount-ro", "/"),
        *(["--seccomp", str(FILTER)] if is_filtered else []),
        *("--json-status-fd", str(STATUS)),
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
    shown = {name: name for name in ("/usr", "/lib", "/lib32", "/lib64") if not os.path.islink(name)}
    for folder in view.folders:
        binds += ["--ro-bind", folder, folder]
        shown[os.path.realpath(folder)] = folder
    for folder in hidden_in(shown, view.hidden):
        binds += ["--ro-bind", str(view.nothing), folder]
    if view.network:
        for name in _FOR_NETWORK:
            binds += ["--ro-bind-try", os.path.realpath(f"/etc/{name}"), f"/etc/{name}"]
    return binds
