"""Attacks on the limits of processes, memory and disk."""

from __future__ import annotations

from typing import Any

from agentrl.attacks.attack import Attack

__all__ = ["RESOURCES"]

# What selfcheck opens a sandbox with (agentrl.attacks.stage.SELF_CHECK_LIMITS): 128 MiB, 32 processes, 16 MiB
# of disk, 64 KiB of output, 2 s of CPU time, 20 s of wall clock. An attack that goes well beyond one has
# broken it.


_FORKS = """
import os, sys, time
from probe import *
kept, refused = 0, 0
begun = time.monotonic()
while time.monotonic() - begun < 3 and refused < 50 and kept < 200:
    try:
        child = os.fork()
    except OSError:
        refused += 1
        time.sleep(0.005)
        continue
    if child == 0:
        {child}
        time.sleep(20)
        os._exit(0)
    kept += 1
if kept > 64:
    broke(f"{{kept}} processes at once")
done()
sys.exit({code})
"""

_MEMORY: dict[str, Any] = {"needs": ("memory_mib",), "statuses": ("memory",), "finishes": False}

RESOURCES: tuple[Attack, ...] = (
    Attack(
        name="fork-bomb",
        group="resources",
        tries="fork without end",
        source=_FORKS.format(child="pass", code=1),
        needs=("pids", "survivors"),
        statuses=("error",),
        flag="pids_hit",
    ),
    Attack(
        name="fork-bomb-that-hides",
        group="resources",
        tries="fork without end; the children take new sessions and close everything",
        source=_FORKS.format(child="os.setsid(); os.closerange(0, 100)", code=1),
        needs=("pids", "survivors"),
        statuses=("error",),
        flag="pids_hit",
    ),
    Attack(
        name="fork-bomb-that-grows",
        group="resources",
        tries="double with every generation until the deadline",
        source="""
import os, time
from probe import *
contained()
begun = time.monotonic()
while time.monotonic() - begun < 30:
    try:
        os.fork()
    except OSError:
        time.sleep(0.01)
""",
        needs=("pids", "survivors", "wall_s"),
        limits={"wall_s": 1.5},
        statuses=("wall", "cpu", "error", "signal", "memory"),
        flag="pids_hit",
    ),
    Attack(
        name="thread-bomb",
        group="resources",
        tries="start threads without end",
        source="""
import threading, time
from probe import *
kept = 0
for _ in range(300):
    try:
        threading.Thread(target=time.sleep, args=(20,), daemon=True).start()
        kept += 1
    except RuntimeError:
        break
if kept > 64:
    broke(f"{kept} threads at once")
done()
""",
        needs=("pids",),
        flag="pids_hit",
    ),
    Attack(
        name="zombie-flood",
        group="resources",
        tries="leave children that nobody reaps",
        source="""
import os
from probe import *
kept = 0
for _ in range(300):
    try:
        if os.fork() == 0:
            os._exit(0)
        kept += 1
    except OSError:
        break
if kept > 64:
    broke(f"{kept} zombies at once")
done()
""",
        needs=("pids",),
        flag="pids_hit",
    ),
    Attack(
        name="memory",
        group="resources",
        tries="touch every page of three times the limit",
        source="""
from probe import *
block = bytearray(400 << 20)
for at in range(0, len(block), 4096):
    block[at] = 1
broke("400 MiB are resident")
""",
        **_MEMORY,
    ),
    Attack(
        name="memory-shared-among-processes",
        group="resources",
        tries="ten processes, each under the limit",
        source="""
import os, time
from probe import *
for _ in range(10):
    if os.fork() == 0:
        block = bytearray(40 << 20)
        for at in range(0, len(block), 4096):
            block[at] = 1
        time.sleep(1.5)
        os._exit(0)
lived = 0
for _ in range(10):
    lived += os.waitstatus_to_exitcode(os.wait()[1]) == 0
if lived == 10:
    broke("400 MiB were resident in ten processes")
done()
""",
        needs=("memory_mib",),
        statuses=("memory", "ok", "error"),
        finishes=False,
    ),
    Attack(
        name="memory-in-a-child",
        group="resources",
        tries="let a child run out of memory and go on as if nothing had been",
        source="""
import os, sys
from probe import *
child = os.fork()
if child == 0:
    block = bytearray(400 << 20)
    for at in range(0, len(block), 4096):
        block[at] = 1
    broke("400 MiB are resident")
    os._exit(0)
os.waitpid(child, 0)
done()
""",
        needs=("memory_mib",),
        statuses=("memory", "ok"),
    ),
    Attack(
        name="memory-in-a-memfd",
        group="resources",
        tries="put pages into a file that has no name",
        source="""
import os
from probe import *
file = os.memfd_create("hoard")
written = 0
while written < 400 << 20:
    written += os.write(file, bytes(1 << 20))
broke("400 MiB lie in a memfd")
""",
        needs=("memory_mib",),
        statuses=("memory", "error"),
        finishes=False,
    ),
    Attack(
        name="memory-in-pipes-and-sockets",
        group="resources",
        tries="let the kernel hold it: full pipes and socket buffers",
        source="""
import os, socket, fcntl
from probe import *
held, total = [], 0
try:
    while total < 400 << 20:
        first, second = socket.socketpair()
        first.setblocking(False)
        first.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        held.append((first, second))
        try:
            while True:
                total += first.send(bytes(1 << 16))
        except BlockingIOError:
            pass
except OSError:
    pass
if total >= 400 << 20:
    broke(f"{total >> 20} MiB lie in socket buffers")
done()
""",
        needs=("memory_mib",),
        statuses=("memory", "ok", "cpu", "error"),
        finishes=False,
    ),
    Attack(
        name="mlock-and-huge-pages",
        group="resources",
        tries="pin memory, ask for huge pages",
        source="""
import ctypes, mmap, resource
from probe import *
libc = ctypes.CDLL(None, use_errno=True)
block = mmap.mmap(-1, 300 << 20)
address = ctypes.addressof(ctypes.c_char.from_buffer(block))
if libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(300 << 20)) == 0:
    broke("300 MiB are locked")
try:
    huge = mmap.mmap(-1, 256 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x40000)
    for at in range(0, 256 << 20, 2 << 20):
        huge[at] = 1
    broke("256 MiB of huge pages")
except OSError:
    pass
done()
""",
        needs=("memory_mib",),
        statuses=("ok", "memory", "signal"),
    ),
    Attack(
        name="address-space-is-free",
        group="resources",
        tries="reserve 1 TiB that is never touched, as Java, Node and numpy do (this must work)",
        source="""
import mmap
from probe import *
try:
    mmap.mmap(-1, 1 << 40, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000, prot=0)
except (OSError, ValueError) as error:
    broke(f"1 TiB could not be reserved: {error}")
done()
""",
        needs=("memory_mib",),
    ),
    Attack(
        name="out-of-memory-victim",
        group="resources",
        tries="be the last one that the kernel's killer takes",
        source="""
from probe import *
def write():
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("-1000")
    return int(open("/proc/self/oom_score_adj").read()) < 0 or False
attempt("oom_score_adj lowered", write)
if int(open("/proc/self/oom_score_adj").read()) < 0:
    broke("oom_score_adj is below 0")
done()
""",
        needs=("privileges",),
    ),
    *(
        Attack(
            name=f"fill-{label}",
            group="resources",
            tries=f"write until {folder} is full",
            source=f"""
import errno, os
from probe import *
written, why = 0, None
try:
    with open(os.path.join({folder!r}, MARK), "wb", buffering=0) as file:
        while written < 100 << 20:
            written += file.write(bytes(1 << 20))
except OSError as error:
    why = error.errno
if written > 40 << 20:
    broke(f"{{written >> 20}} MiB were written")
elif why not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.ENOENT):
    broke(f"the end was errno {{why}} after {{written}} bytes")
done()
""",
            needs=("disk_mib",),
            statuses=("ok", "memory"),
        )
        for label, folder in (
            ("tmp", "/tmp"),
            ("work", "."),
            ("shm", "/dev/shm"),
            ("root", "/"),
            ("var-tmp", "/var/tmp"),
            ("home", "/root"),
        )
    ),
    Attack(
        name="many-files",
        group="resources",
        tries="a million empty files",
        source="""
import os, time
from probe import *
made, begun = 0, time.monotonic()
try:
    for folder in range(1000):
        os.mkdir(str(folder))
        for name in range(1000):
            os.close(os.open(f"{folder}/{name}", os.O_CREAT | os.O_WRONLY))
            made += 1
except OSError:
    pass
if made >= 999_000:
    broke(f"{made} files")
done()
""",
        needs=("disk_mib",),
        statuses=("ok", "memory", "cpu", "wall"),
        check=lambda seen: "" if seen.seconds < 12 else f"its removal took {seen.seconds:.0f} s",
    ),
    Attack(
        name="growth-through-a-mapping",
        group="resources",
        tries="grow a sparse file beyond the disk's limit and touch it through memory",
        source="""
import mmap, os
from probe import *
file = os.open("sparse", os.O_RDWR | os.O_CREAT)
try:
    os.ftruncate(file, 100 << 20)
    pages = mmap.mmap(file, 100 << 20)
    for at in range(0, 100 << 20, 4096):
        pages[at] = 1
    broke("100 MiB behind a mapping")
except OSError:
    pass
done()
""",
        needs=("disk_mib",),
        statuses=("ok", "memory", "signal"),
    ),
    Attack(
        name="fallocate",
        group="resources",
        tries="reserve disk without writing",
        source="""
import os
from probe import *
for folder in (".", "/tmp"):
    def work(folder=folder):
        os.posix_fallocate(os.open(os.path.join(folder, "f" + MARK), os.O_RDWR | os.O_CREAT), 0, 100 << 20)
    attempt(f"100 MiB reserved in {folder}", work)
done()
""",
        needs=("disk_mib",),
        statuses=("ok", "memory"),
    ),
    Attack(
        name="file-size-signal",
        group="resources",
        tries="ignore SIGXFSZ and lower a limit to raise it again",
        source="""
import resource, signal
from probe import *
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for name in ("RLIMIT_NPROC", "RLIMIT_NOFILE", "RLIMIT_MEMLOCK", "RLIMIT_CORE", "RLIMIT_NICE"):
    number = getattr(resource, name, None)
    if number is None:
        continue
    soft, hard = resource.getrlimit(number)
    if hard != resource.RLIM_INFINITY:
        def work(number=number, hard=hard):
            resource.setrlimit(number, (hard + 1, hard + 1))
        attempt(f"{name} raised above {hard}", work)
done()
""",
        needs=("privileges",),
    ),
)
