"""Attacks on the limits of time and output, and on what else a kernel counts for a process."""

from __future__ import annotations

from typing import Any

from agentrl.attacks.attack import Attack, Seen

__all__ = ["CLOCKS"]


def _kept_little(seen: Seen) -> str:
    kept = len(seen.result.stdout) + len(seen.result.stderr)
    if kept > 2 * 65 * 1024:
        return f"{kept} bytes of output were kept"
    return "" if seen.result.truncated else "nothing was counted as dropped"


def _counted_cpu(seen: Seen) -> str:
    cpu_ms = seen.result.cpu_ms
    return "" if 700 < cpu_ms < 4000 else f"{cpu_ms:.0f} ms of CPU time were counted, with a limit of 1000"


def _ended_at_the_wall(seen: Seen) -> str:
    wall_ms = seen.result.wall_ms
    return "" if 1400 < wall_ms < 4500 else f"it ended after {wall_ms:.0f} ms, with a limit of 1500"


_SLEEPS: dict[str, Any] = {
    "group": "resources",
    "needs": ("wall_s",),
    "limits": {"wall_s": 1.5},
    "statuses": ("wall",),
    "check": _ended_at_the_wall,
}
_BURNS: dict[str, Any] = {
    "group": "resources",
    "needs": ("cpu_s",),
    "limits": {"cpu_s": 1, "wall_s": 60},
    "statuses": ("cpu",),
    "check": _counted_cpu,
}
_FLOODS: dict[str, Any] = {
    "group": "resources",
    "needs": ("output_kib",),
    "statuses": ("output",),
    "check": _kept_little,
}

CLOCKS: tuple[Attack, ...] = (
    Attack(
        name="endless-stdout", tries="print without end", source="while True: print('x' * 999)", **_FLOODS
    ),
    Attack(
        name="endless-stderr",
        tries="fill stderr while stdout is what is read",
        source="import sys\nwhile True: sys.stderr.write('x' * 9999)",
        **_FLOODS,
    ),
    Attack(
        name="a-hundred-mebibytes-of-stdout",
        tries="fill the host's log of an engine that keeps one",
        source="import os\nfor _ in range(1600): os.write(1, bytes(1 << 16))",
        **_FLOODS,
    ),
    Attack(
        name="flood-from-children",
        tries="print without end from processes that outlive the first",
        source="""
import os, time
for _ in range(4):
    if os.fork() == 0:
        while True:
            os.write(1, bytes(1 << 16))
time.sleep(20)
""",
        **_FLOODS,
    ),
    Attack(name="burn", tries="compute without end", source="while True: pass", **_BURNS),
    Attack(
        name="burn-in-many-processes",
        tries="many processes, each under the CPU limit",
        source="""
import os, time
for _ in range(8):
    if os.fork() == 0:
        until = time.process_time() + 0.8
        while time.process_time() < until:
            pass
        os._exit(0)
for _ in range(8):
    os.wait()
print("DONE")
""",
        **_BURNS,
    ),
    Attack(
        name="burn-in-threads",
        tries="threads inside one big computation each",
        source="""
import hashlib, threading
def work():
    while True:
        hashlib.pbkdf2_hmac("sha256", b"x", b"y", 200_000)
for _ in range(4):
    threading.Thread(target=work).start()
""",
        **_BURNS,
    ),
    Attack(
        name="burn-behind-a-sleeper",
        tries="let children of children burn while the first process sleeps, and end them often",
        source="""
import os, time
if os.fork() == 0:
    os.setsid()
    while True:
        if os.fork() == 0:
            until = time.process_time() + 0.05
            while time.process_time() < until:
                pass
            os._exit(0)
        os.wait()
time.sleep(20)
""",
        **_BURNS,
    ),
    Attack(
        name="burn-and-refuse-signals",
        tries="ignore SIGXCPU, SIGTERM, SIGALRM and every other signal that can be",
        source="""
import signal
for number in range(1, 65):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
signal.alarm(0)
while True: pass
""",
        **_BURNS,
    ),
    Attack(
        name="burn-in-a-regular-expression",
        tries="backtrack inside one call that no Python code can interrupt",
        source="import re\nre.match('(a*)*b', 'a' * 60)",
        **_BURNS,
    ),
    Attack(name="sleep", tries="wait without end", source="import time; time.sleep(1e9)", **_SLEEPS),
    Attack(
        name="sleep-and-refuse-signals",
        tries="wait without end behind ignored signals",
        source="""
import signal, time
for number in range(1, 65):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
signal.setitimer(signal.ITIMER_REAL, 0)
time.sleep(1e9)
""",
        **_SLEEPS,
    ),
    Attack(
        name="stop-oneself",
        tries="SIGSTOP to oneself",
        source="import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)",
        **_SLEEPS,
    ),
    Attack(
        name="stop-everybody",
        tries="SIGSTOP to the parent and to everything in sight",
        source="""
import os, signal, time
from probe import *
contained()
for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdecimal()):
    if pid != os.getpid():
        try:
            os.kill(pid, signal.SIGSTOP)
        except OSError:
            pass
time.sleep(20)
""",
        **_SLEEPS | {"needs": ("wall_s", "processes")},
    ),
    Attack(
        name="trace-oneself",
        tries="be stopped by a tracer of one's own, where the killer may wait for it",
        source="""
import ctypes, os, signal, time
libc = ctypes.CDLL(None)
if os.fork() == 0:
    libc.ptrace(0, 0, 0, 0)
    os.kill(os.getpid(), signal.SIGSTOP)
time.sleep(1e9)
""",
        **_SLEEPS,
    ),
    Attack(
        name="input-with-no-input",
        group="resources",
        tries="block on input() with an empty stdin",
        source="""
try:
    input()
except EOFError:
    print("DONE")
""",
        check=lambda seen: "" if seen.result.wall_ms < 4000 else "end of file came late",
    ),
    Attack(
        name="many-descriptors",
        group="resources",
        tries="open a million files",
        source="""
import os
from probe import *
opened = 0
try:
    while opened < 1_100_000:
        os.open("/dev/null", os.O_RDONLY)
        opened += 1
    broke(f"{opened} descriptors")
except OSError:
    pass
done()
""",
        statuses=("ok", "memory"),
        finishes=False,
    ),
    Attack(
        name="timers",
        group="resources",
        tries="storms of timers, event counters, epolls and inotify watches",
        source="""
import ctypes, os, select
from probe import *
libc = ctypes.CDLL(None, use_errno=True)
for make in (lambda: libc.timerfd_create(1, 0), lambda: libc.eventfd(0, 0), lambda: libc.inotify_init1(0),
             lambda: select.epoll().fileno()):
    for _ in range(20_000):
        try:
            if make() < 0:
                break
        except OSError:
            break
    os.closerange(3, 30_000)
identity = ctypes.c_void_p()
for _ in range(200_000):
    if libc.timer_create(1, None, ctypes.byref(identity)) < 0:
        break
done()
""",
        statuses=("ok", "memory", "cpu", "error"),
        finishes=False,
    ),
    Attack(
        name="big-environment-and-arguments",
        group="resources",
        tries="exec with an environment and arguments as large as the kernel takes",
        source="""
import os, sys
from probe import *
for size in (1 << 17, 1 << 20, 1 << 24):
    if os.fork() == 0:
        try:
            words = ["x" * 100_000] * (size // 100_000 + 1)
            variables = {"A" + str(number): "y" * 1000 for number in range(999)}
            os.execve(sys.executable, [sys.executable, "-c", "pass", *words], variables)
        except OSError:
            os._exit(1)
    os.wait()
done()
""",
        statuses=("ok", "memory"),
    ),
    Attack(
        name="stack-exhaustion",
        group="resources",
        tries="recurse without end with the interpreter's limit lifted",
        source="""
import sys
sys.setrecursionlimit(10**9)
class Deep:
    def __repr__(self):
        return repr([self])
def down():
    return [down() for _ in (1,)] and repr(Deep())
down()
""",
        needs=("memory_mib",),
        statuses=("signal", "memory", "error", "cpu"),
        finishes=False,
    ),
    Attack(
        name="core-dump",
        group="resources",
        tries="leave a core file of oneself, wherever the host's pattern puts it",
        source="""
import ctypes, os, resource
from probe import *
try:
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
except (OSError, ValueError):
    pass
for _ in range(3):
    if os.fork() == 0:
        ctypes.string_at(0)
    os.wait()
if [name for name in os.listdir(".") if name.startswith("core")]:
    broke("there is a core file")
done()
""",
        needs=("files",),
    ),
    Attack(
        name="priority",
        group="resources",
        tries="raise one's own priority, take real time, move to every core",
        source="""
import os
from probe import *
attempt("nice -20", lambda: os.setpriority(os.PRIO_PROCESS, 0, -20))
attempt("nice lowered by 1", lambda: os.nice(-1) < 0 and os.nice(-1))
attempt("real-time scheduling", lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1)))
done()
""",
        needs=("privileges",),
    ),
    Attack(
        name="set-the-clock",
        group="resources",
        tries="turn the host's clock back",
        source="""
import time
from probe import *
attempt("CLOCK_REALTIME set", lambda: time.clock_settime(time.CLOCK_REALTIME, time.time()))
for name in ("settimeofday", "adjtimex"):
    attempt(name, lambda name=name: syscall(name, 0, 0) and False)
done()
""",
        needs=("privileges",),
    ),
    Attack(
        name="exit-at-the-deadline",
        group="resources",
        tries="end just when the limit does",
        source="import time\ntime.sleep(1.42)",
        needs=("wall_s", "survivors"),
        limits={"wall_s": 1.5},
        statuses=("ok", "wall"),
        finishes=False,
    ),
    Attack(
        name="exhaust-processes-and-wait",
        group="resources",
        tries="leave no process number for whoever wants to start a killer inside",
        source="""
import os, time
from probe import *
contained()
while True:
    try:
        if os.fork() == 0:
            time.sleep(1e9)
    except OSError:
        time.sleep(0.01)
""",
        needs=("pids", "wall_s", "survivors"),
        limits={"wall_s": 1.5},
        statuses=("wall",),
        check=lambda seen: "" if seen.seconds < 8 else f"the end took {seen.seconds:.1f} s",
    ),
)
