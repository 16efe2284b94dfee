"""Attacks that outlive their run, or that kill, stop or trace who watches them."""

from __future__ import annotations

from typing import Any

from agentrl.attacks.attack import Attack

__all__ = ["PROCESSES"]

_LEFT: dict[str, Any] = {"group": "processes", "needs": ("survivors",)}
_KILLS: dict[str, Any] = {
    "group": "processes",
    "needs": ("processes", "survivors"),
    "statuses": ("ok", "signal", "error"),
    "finishes": False,
}

PROCESSES: tuple[Attack, ...] = (
    Attack(
        name="leave-a-sleeper",
        tries="setsid sleep, then time out",
        source="""
import os, time
from probe import *
if os.fork() == 0:
    os.setsid()
    os.execv("/bin/sh", ["sh", "-c", "sleep 20; : " + MARK])
time.sleep(1e9)
""",
        **_LEFT | {"needs": ("survivors", "wall_s")},
        limits={"wall_s": 1},
        statuses=("wall",),
    ),
    Attack(
        name="leave-a-daemon",
        tries="fork twice, take a new session, close everything, and let the first process end",
        source="""
import os, time
from probe import *
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.closerange(0, 1000)
        time.sleep(20)
    os._exit(0)
os.wait()
done()
""",
        **_LEFT,
    ),
    Attack(
        name="leave-a-daemon-that-holds-the-pipes",
        tries="leave a process that keeps stdout and stderr open, so that whoever reads to the end waits",
        source="""
import os, time
from probe import *
done()
if os.fork() == 0:
    os.setsid()
    time.sleep(20)
""",
        check=lambda seen: "" if seen.seconds < 5 else f"the reader waited {seen.seconds:.1f} s",
        **_LEFT,
    ),
    Attack(
        name="leave-a-renamed-process",
        tries="leave a process whose name, arguments and environment are gone",
        source="""
import ctypes, os, time
from probe import *
if os.fork() == 0:
    os.setsid()
    ctypes.CDLL(None).prctl(15, b"kthreadd", 0, 0, 0)
    ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)
    time.sleep(20)
done()
""",
        **_LEFT,
    ),
    Attack(
        name="leave-a-process-that-keeps-forking",
        tries="change the process number faster than a killer can list them",
        source="""
import os
from probe import *
done()
if os.fork() == 0:
    os.setsid()
    for _ in range(20_000):
        if os.fork():
            os._exit(0)
""",
        **_LEFT,
    ),
    Attack(
        name="clear-the-parents-death-signal",
        tries="prctl(PR_SET_PDEATHSIG, 0), then be orphaned",
        source="""
import ctypes, os, time
from probe import *
libc = ctypes.CDLL(None)
libc.prctl(1, 0, 0, 0, 0)
if os.fork() == 0:
    libc.prctl(1, 0, 0, 0, 0)
    os.setsid()
    time.sleep(20)
done()
""",
        **_LEFT,
    ),
    Attack(
        name="become-a-reaper",
        tries="PR_SET_CHILD_SUBREAPER and a tree below it",
        source="""
import ctypes, os, time
from probe import *
if os.fork() == 0:
    os.setsid()
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
    for _ in range(5):
        if os.fork() == 0:
            os.setsid()
            time.sleep(20)
            os._exit(0)
    time.sleep(20)
done()
""",
        **_LEFT,
    ),
    Attack(
        name="leave-a-process-in-another-namespace",
        tries="unshare what can be unshared and leave a process there",
        source="""
import os, time
from probe import *
if os.fork() == 0:
    for flags in (0x10000000, 0x20000000, 0x00020000, 0x02000000):
        try:
            syscall("unshare", flags)
        except OSError:
            pass
    if os.fork() == 0:
        time.sleep(20)
        os._exit(0)
    time.sleep(20)
done()
""",
        **_LEFT,
    ),
    Attack(
        name="leave-threads",
        tries="let threads that are no daemons outlive the main one",
        source="""
import threading, time
from probe import *
threading.Thread(target=time.sleep, args=(1e6,)).start()
done()
""",
        **_LEFT | {"needs": ("survivors", "wall_s")},
        limits={"wall_s": 1.5},
        statuses=("wall",),
    ),
    Attack(
        name="write-after-the-end",
        tries="go on writing into the working directory after the run",
        source="""
import os, time
from probe import *
done()
if os.fork() == 0:
    os.setsid()
    while True:
        open("later", "w").write(str(time.time()))
        time.sleep(0.01)
""",
        **_LEFT,
    ),
    Attack(
        name="kill-the-parent",
        tries="SIGKILL to the parent",
        source="""
import os
from probe import *
contained()
os.kill(os.getppid() or 1, 9)
done()
""",
        **_KILLS,
    ),
    Attack(
        name="kill-everything",
        tries="kill -9 -1",
        source="""
import os
from probe import *
contained()
os.kill(-1, 9)
done()
""",
        **_KILLS,
    ),
    Attack(
        name="kill-the-first",
        tries="kill -9 1, and every other signal to it",
        source="""
import os
from probe import *
contained()
for number in (9, 15, 2, 1, 3, 6, 11, 18, 19):
    try:
        os.kill(1, number)
    except OSError:
        pass
done()
""",
        **_KILLS,
    ),
    Attack(
        name="kill-ones-group",
        tries="SIGKILL to the own process group",
        source="""
import os
from probe import *
contained()
os.killpg(0, 9)
""",
        **_KILLS,
    ),
    Attack(
        name="kill-oneself",
        tries="end by SIGKILL, as if by the kernel or by the world",
        source="import os\nos.kill(os.getpid(), 9)",
        **_KILLS | {"statuses": ("signal",)},
    ),
    Attack(
        name="kill-a-process-of-the-host",
        tries="signal the process numbers that the host uses",
        source="""
import os
from probe import *
def look():
    with open(f"/proc/{FACTS['host_pid']}/cmdline") as file:
        return file.read() == FACTS["host_command"]
attempt("the host's own command line", look)
done()
""",
        group="processes",
        needs=("processes",),
    ),
    Attack(
        name="see-processes",
        tries="list /proc",
        source="""
import os
from probe import *
pids = [int(name) for name in os.listdir("/proc") if name.isdecimal()]
if len(pids) > 8:
    broke(f"{len(pids)} processes are visible")
done()
""",
        group="processes",
        needs=("processes",),
    ),
    Attack(
        name="trace-the-first",
        tries="ptrace process 1 and the parent, read and write their memory",
        source="""
import ctypes, os
from probe import *
for pid in {1, os.getppid()} - {0, os.getpid()}:
    attempt(f"PTRACE_ATTACH to {pid}", lambda pid=pid: syscall("ptrace", 16, pid, 0, 0) == 0)
    attempt(f"PTRACE_SEIZE of {pid}", lambda pid=pid: syscall("ptrace", 0x4206, pid, 0, 0) == 0)
    attempt(f"/proc/{pid}/mem opened", lambda pid=pid: open(f"/proc/{pid}/mem", "rb+"))
    attempt(f"a descriptor of {pid}", lambda pid=pid: syscall("pidfd_getfd", syscall("pidfd_open", pid, 0),
        0, 0))
    attempt(f"{pid}'s descriptors listed", lambda pid=pid: os.listdir(f"/proc/{pid}/fd") or False)
done()
""",
        group="processes",
        needs=("processes", "environment"),
    ),
    Attack(
        name="write-ones-own-memory",
        tries="change code of one's own that is mapped read-only, through /proc/self/mem (no harm outside)",
        source="""
from probe import *
try:
    with open("/proc/self/mem", "rb+", buffering=0) as memory, open("/proc/self/maps") as maps:
        line = next(line for line in maps if "libc" in line and "r-x" in line)
        memory.seek(int(line.split("-")[0], 16))
        memory.write(b"x" * 16)
except (OSError, StopIteration):
    pass
with open(__file__) as file:
    if "write" not in file.read():
        broke("a file on disk changed")
done()
""",
        group="processes",
        needs=("files",),
        statuses=("ok", "signal"),
        finishes=False,
    ),
    Attack(
        name="double-fork-at-exit",
        tries="spawn from atexit handlers, finalizers and signal handlers",
        source="""
import atexit, os, signal, time
from probe import *
def spawn(*_):
    if os.fork() == 0:
        os.setsid()
        time.sleep(20)
        os._exit(0)
class Last:
    def __del__(self, spawn=spawn):
        spawn()
atexit.register(spawn)
last = Last()
signal.signal(signal.SIGTERM, spawn)
done()
""",
        **_LEFT,
    ),
    Attack(
        name="run-a-file-without-a-name",
        tries="memfd_create and exec of it, so that no path is there to find",
        source="""
import os, time
from probe import *
if os.fork() == 0:
    os.setsid()
    file = os.memfd_create("nobody", 0)
    os.write(file, b"#!/bin/sh\\nsleep 20\\n: " + MARK.encode())
    try:
        os.execve(file, ["nobody", MARK], dict(os.environ))
    except OSError:
        os._exit(0)
time.sleep(0.3)
done()
""",
        **_LEFT,
    ),
)
