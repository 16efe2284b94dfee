"""What attacks import inside a sandbox, as ``probe``; stdlib only, sent as source text.

Started as ``python3 attack.py MARK FACTS``: a word that tells this attack's processes from all others, and
JSON of where the host planted what must not be reached.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

__all__ = ["FACTS", "MARK", "SYSCALLS", "attempt", "broke", "contained", "done", "raises", "say", "syscall"]

MARK = sys.argv[1] if len(sys.argv) > 1 else ""
FACTS: dict[str, Any] = json.loads(sys.argv[2]) if len(sys.argv) > 2 else {}
os.environ["AGENTRL_MARK"] = MARK  # so that what is started by exec is known too

_X86 = {
    "mount": 165, "umount2": 166, "pivot_root": 155, "chroot": 161, "ptrace": 101, "bpf": 321,
    "userfaultfd": 323, "perf_event_open": 298, "io_uring_setup": 425, "add_key": 248, "request_key": 249,
    "keyctl": 250, "kexec_load": 246, "init_module": 175, "finit_module": 313, "delete_module": 176,
    "open_by_handle_at": 304, "name_to_handle_at": 303, "process_vm_readv": 310, "process_vm_writev": 311,
    "unshare": 272, "setns": 308, "clone": 56, "clone3": 435, "memfd_create": 319, "fsopen": 430,
    "fsmount": 432, "open_tree": 428, "move_mount": 429, "mount_setattr": 442, "swapon": 167,
        "reboot": 169, "syslog": 103,
    "acct": 163, "quotactl": 179, "settimeofday": 164, "clock_settime": 227, "adjtimex": 159,
    "sethostname": 170, "setdomainname": 171, "iopl": 172, "ioperm": 173, "mknod": 133, "pidfd_open": 434,
    "pidfd_getfd": 438, "kcmp": 312, "fanotify_init": 300, "vmsplice": 278, "personality": 135,
    "modify_ldt": 154, "setuid": 105, "move_pages": 279, "mbind": 237, "lookup_dcookie": 212,
}  # fmt: skip
_ARM: dict[str, Any] = {
    "mount": 40, "umount2": 39, "pivot_root": 41, "chroot": 51, "ptrace": 117, "bpf": 280,
    "userfaultfd": 282, "perf_event_open": 241, "io_uring_setup": 425, "add_key": 217, "request_key": 218,
    "keyctl": 219, "kexec_load": 104, "init_module": 105, "finit_module": 273, "delete_module": 106,
    "open_by_handle_at": 265, "name_to_handle_at": 264, "process_vm_readv": 270, "process_vm_writev": 271,
    "unshare": 97, "setns": 268, "clone": 220, "clone3": 435, "memfd_create": 279, "fsopen": 430,
    "fsmount": 432, "open_tree": 428, "move_mount": 429, "mount_setattr": 442, "swapon": 224,
        "reboot": 142, "syslog": 116,
    "acct": 89, "quotactl": 60, "settimeofday": 170, "clock_settime": 112, "adjtimex": 171,
    "sethostname": 161, "setdomainname": 162, "mknod": 33, "pidfd_open": 434,
    "pidfd_getfd": 438, "kcmp": 272, "fanotify_init": 262, "vmsplice": 75, "personality": 92,
    "setuid": 146, "move_pages": 239, "mbind": 235, "lookup_dcookie": 18,
}  # fmt: skip
SYSCALLS = _ARM if os.uname().machine in ("aarch64", "arm64") else _X86


def say(line: str) -> None:
    """One line to stdout, whole and at once, whatever has become of sys.stdout."""
    os.write(1, (line.replace("\n", " ") + "\n").encode("utf-8", "replace"))


def broke(what: str) -> None:
    """Tell that something was possible that must not be."""
    say("BROKEN: " + what[:300])


def done() -> None:
    """Tell that everything was tried."""
    say("DONE")


def syscall(name: str, *arguments: Any) -> int:
    """A system call past every library. Raises OSError; ENOSYS where this machine has none of that name."""
    if name not in SYSCALLS:
        raise OSError(errno.ENOSYS, name)
    call = ctypes.CDLL(None, use_errno=True).syscall
    call.restype = ctypes.c_long
    passed = [ctypes.c_long(one) if isinstance(one, int) else one for one in arguments]
    returned = call(ctypes.c_long(SYSCALLS[name]), *passed)
    if returned < 0:
        raise OSError(ctypes.get_errno(), name)
    return int(returned)


def attempt(what: str, work: Callable[[], Any]) -> None:
    """Call ``work`` in a child of its own; that it raises nothing and returns anything but False is broken.

    A child, so that a filter that kills, a crash or a changed identity ends it and not the attack.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            got = work()
            if got is not False:
                os.write(writing, repr(got)[:200].encode("utf-8", "replace") or b"None")
        except BaseException:
            pass
        finally:
            os._exit(0)
    os.close(writing)
    signal.alarm(0)
    with open(reading, "rb", closefd=True) as pipe:
        got = pipe.read(400)
    os.waitpid(child, 0)
    if got:
        broke(f"{what}: {got.decode('utf-8', 'replace')}")


def raises(what: str, work: Callable[[], Any]) -> None:
    """Like ``attempt``, in this very process: ``work`` must raise OSError, or return False."""
    try:
        got = work()
    except (OSError, MemoryError, RuntimeError, ValueError, AttributeError, ImportError):
        return
    if got is not False:
        broke(f"{what}: {got!r}")


def contained() -> None:
    """Go no further where this is the host itself: what comes next would hurt it."""
    own = os.readlink("/proc/self/ns/pid") if os.path.exists("/proc/self/ns/pid") else ""
    if own == FACTS.get("pid_namespace"):
        broke("it shares the host's process namespace")
        sys.exit(0)
