"""Attacks that want another identity, a capability, another namespace or the kernel itself."""

from __future__ import annotations

from typing import Any

from agentrl.attacks.attack import Attack

__all__ = ["PRIVILEGES"]

_PRIVILEGES: dict[str, Any] = {"group": "isolation", "needs": ("privileges",)}

PRIVILEGES: tuple[Attack, ...] = (
    Attack(
        name="hold-capabilities",
        tries="look at one's own identity, capabilities and no-new-privileges",
        source="""
import os
from probe import *
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
for name in ("CapEff", "CapPrm", "CapInh", "CapBnd", "CapAmb"):
    if int(status[name], 16) and name != "CapBnd":
        broke(f"{name} is {status[name].strip()}")
if int(status["NoNewPrivs"]) != 1:
    broke("NoNewPrivs is 0")
if 0 in os.getresuid() + os.getresgid():
    broke(f"it runs as {os.getresuid()} {os.getresgid()}")
if 0 in os.getgroups():
    broke(f"it is in the groups {os.getgroups()}")
attempt("setuid(0)", lambda: os.setuid(0))
attempt("setgroups", lambda: os.setgroups([0]))
attempt("setresuid", lambda: os.setresuid(1, 1, 1))
done()
""",
        **_PRIVILEGES,
    ),
    Attack(
        name="use-capabilities",
        tries="chown, mount, raw sockets, chroot and a new host name",
        source="""
import os, socket
from probe import *
open("own", "w").close()
attempt("chown to root", lambda: os.chown("own", 0, 0))
attempt("setuid bit for root", lambda: os.chown("own", 0, -1) or os.chmod("own", 0o4755))
attempt("raw socket", lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1))
attempt("chroot", lambda: os.chroot("/work"))
attempt("sethostname", lambda: socket.sethostname("owned"))
attempt("mount of a tmpfs", lambda: syscall("mount", b"t", b"/tmp", b"tmpfs", 0, 0) == 0)
attempt("mount of proc", lambda: syscall("mount", b"p", b"/proc", b"proc", 0, 0) == 0)
done()
""",
        **_PRIVILEGES,
    ),
    Attack(
        name="run-setuid-files",
        tries="su, sudo, mount, ping, newuidmap and every other setuid file",
        source="""
import glob, os, subprocess
from probe import *
found = [path for folder in ("/bin", "/usr/bin", "/usr/sbin",
    "/usr/lib/openssh") for path in glob.glob(folder + "/*")
         if os.path.isfile(path) and os.stat(path).st_mode & 0o6000]
for command in (["su", "-c", "id -u"], ["sudo", "-n", "id", "-u"], ["newgrp", "root"], ["passwd", "-S",
    "root"],
                *([path, "--help"] for path in found)):
    try:
        did = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=2)
    except (OSError, subprocess.TimeoutExpired):
        continue
    if did.stdout.strip() == b"0":
        broke(f"{command} gave root")
open("suid", "wb").write(open("/bin/sh", "rb").read())
os.chmod("suid", 0o6755)
did = subprocess.run(["./suid", "-c", "id -u"], capture_output=True)
if did.stdout.strip() == b"0":
    broke("a setuid file of one's own gave root")
done()
""",
        limits={"wall_s": 60, "cpu_s": 8},
        **_PRIVILEGES,
    ),
    Attack(
        name="remount",
        tries="remount what is read-only, pivot_root, bind, and the new mount interface",
        source="""
from probe import *
for path in (b"/", b"/usr", b"/etc", b"/proc", b"/sys", b"/work", b"/dev"):
    attempt(f"remount of {path}", lambda path=path: syscall("mount", b"none", path, b"", 32 | 4096, b"") == 0)
    attempt(f"remount of {path}, alone", lambda path=path: syscall("mount", b"none", path, b"", 32, b"") == 0)
    attempt(f"{path} unmounted", lambda path=path: syscall("umount2", path, 2) == 0)
    attempt(f"{path} shared", lambda path=path: syscall("mount", b"none", path, b"", 1 << 20, b"") == 0)
attempt("bind", lambda: syscall("mount", b"/work", b"/tmp", b"", 4096, b"") == 0)
attempt("pivot_root", lambda: syscall("pivot_root", b"/work", b"/work") == 0)
attempt("fsopen", lambda: syscall("fsopen", b"tmpfs", 0))
attempt("open_tree", lambda: syscall("open_tree", -100, b"/", 1))
attempt("mount_setattr", lambda: syscall("mount_setattr", -100, b"/", 0, bytes(32), 32) == 0)
attempt("swapon", lambda: syscall("swapon", b"/work/swap", 0) == 0)
done()
""",
        **_PRIVILEGES,
    ),
    Attack(
        name="nest-user-namespaces",
        tries="become root of a user namespace and mount there",
        source="""
import os
from probe import *
def nest():
    syscall("unshare", 0x10000000 | 0x20000)
    with open("/proc/self/uid_map", "w") as file:
        file.write(f"0 {os.getuid()} 1")
    return True
def nest_and_mount():
    own = os.getuid()
    syscall("unshare", 0x10000000 | 0x20000)
    open("/proc/self/setgroups", "w").write("deny")
    open("/proc/self/uid_map", "w").write(f"0 {own} 1")
    return syscall("mount", b"none", b"/", b"", 16384 | 262144, 0) == 0 and syscall("mount", b"t", b"/usr",
        b"tmpfs", 0, 0) == 0
attempt("a user namespace", lambda: syscall("unshare", 0x10000000) == 0)
attempt("a user namespace with a root", nest)
attempt("a mount in one", nest_and_mount)
attempt("clone of one", lambda: syscall("clone", 0x10000000 | 17, 0, 0, 0, 0) >= 0)
for path in ("/proc/1/ns/mnt", "/proc/1/ns/pid", "/proc/1/ns/net", "/proc/1/ns/user"):
    def enter(path=path):
        return syscall("setns", os.open(path, os.O_RDONLY), 0) == 0
    attempt(f"setns to {path}", enter)
done()
""",
        **_PRIVILEGES,
    ),
    Attack(
        name="kernel-attack-surface",
        tries="system calls that exploits begin with",
        source="""
from probe import *
zeros = bytes(128)
calls = {"bpf": (0, zeros, 48), "userfaultfd": (0,), "perf_event_open": (zeros, 0, -1, -1, 0),
         "io_uring_setup": (8, bytearray(120) and bytes(120)), "add_key": (b"user", b"agentrl", b"x", 1, -3),
         "keyctl": (0, -3, 1), "request_key": (b"user", b"agentrl", 0, -3), "kexec_load": (0, 0, 0, 0),
         "init_module": (zeros, 128, b""), "finit_module": (0, b"", 0), "delete_module": (b"none", 0),
         "open_by_handle_at": (-100, zeros, 0), "fanotify_init": (0, 0), "syslog": (3, bytes(4096), 4096),
         "acct": (0,), "reboot": (0, 0, 0, 0), "iopl": (3,), "ioperm": (0x80, 1, 1), "sethostname": (b"x", 1),
         "setdomainname": (b"x", 1), "settimeofday": (zeros, 0)}
for name, arguments in calls.items():
    attempt(name, lambda name=name, arguments=arguments: syscall(name, *arguments) >= 0)
done()
""",
        **_PRIVILEGES,
    ),
    Attack(
        name="write-cgroups",
        tries="leave the own cgroup, set release_agent, lift limits",
        source="""
import glob, os
from probe import *
names = ("release_agent", "cgroup.procs", "tasks", "notify_on_release", "memory.max", "memory.limit_in_bytes",
         "pids.max", "devices.allow", "cgroup.kill", "freezer.state")
for name in names:
    for path in glob.glob(f"/sys/fs/cgroup/**/{name}", recursive=True)[:20]:
        attempt(f"{path} opened to write", lambda path=path: open(path, "r+b"))
for folder in [path for path in glob.glob("/sys/fs/cgroup/*") + ["/sys/fs/cgroup"] if os.path.isdir(path)]:
    def work(folder=folder):
        os.mkdir(folder + "/" + MARK)
        os.rmdir(folder + "/" + MARK)
    attempt("a new cgroup", work)
done()
""",
        **_PRIVILEGES,
    ),
    Attack(
        name="write-kernel-settings",
        tries="/proc/sys, sysrq, core_pattern, modprobe, binfmt_misc and uevent_helper",
        source="""
import os
from probe import *
for path in ("/proc/sys/kernel/core_pattern", "/proc/sys/kernel/modprobe", "/proc/sysrq-trigger",
    "/proc/sys/vm/drop_caches",
             "/proc/sys/fs/binfmt_misc/register", "/sys/kernel/uevent_helper", "/proc/sys/kernel/hostname",
             "/proc/sys/kernel/yama/ptrace_scope", "/proc/sys/net/ipv4/ip_forward",
             "/proc/sys/kernel/pid_max", "/proc/sys/kernel/shmmax", "/proc/sys/fs/mqueue/msg_max",
             "/proc/sys/user/max_user_namespaces", "/sys/power/state",
                 "/proc/irq/default_smp_affinity"):
    attempt(f"{path} opened to write", lambda path=path: os.open(path, os.O_WRONLY))
attempt("the kernel's log", lambda: os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK))
done()
""",
        **_PRIVILEGES,
    ),
    Attack(
        name="type-into-the-terminal",
        tries="TIOCSTI and TIOCLINUX on whatever terminal is there",
        source="""
import fcntl, os
from probe import *
def work(path):
    terminal = os.open(path, os.O_RDWR | os.O_NOCTTY)
    fcntl.ioctl(terminal, 0x5412, b"x")
    return path
for path in ("/dev/tty", "/dev/console", "/dev/tty1", "/proc/1/fd/0", "/proc/self/fd/0"):
    attempt("typed", lambda path=path: work(path))
done()
""",
        group="isolation",
        needs=("privileges", "processes"),
    ),
    Attack(
        name="change-the-personality",
        tries="switch off address randomisation and read-implies-exec for what comes next",
        source="""
from probe import *
def work():
    syscall("personality", 0x0040000 | 0x0400000)
    return False
attempt("personality", work)
if FACTS["host_pid"] and open("/proc/self/personality").read().strip() not in ("00000000", "0"):
    broke("the personality was changed before")
done()
""",
        group="isolation",
        needs=("privileges",),
        statuses=("ok", "error"),
        finishes=False,
    ),
)
