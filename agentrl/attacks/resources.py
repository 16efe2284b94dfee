"""Attacks on the limits of processes and disk."""

from __future__ import annotations

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
