"""A system call filter for code that nobody trusts, as classic BPF, for x86_64 and aarch64.

It is a deny list: what reaches into the kernel, the machine or other processes, and no ordinary program
needs, fails with EPERM; sockets are those of local and IP families. CPython, numpy, multiprocessing
and subprocess run under it. Not covered: arguments that lie in memory, such as the names of files.
"""

from __future__ import annotations

import errno
import platform
import struct
from collections.abc import Mapping

__all__ = ["deny_list", "telltale_filter"]

# Numbers on x86_64 and on aarch64, where the call exists, from the kernel's syscall tables.
_DENIED: Mapping[str, tuple[int | None, int | None]] = {
    # other processes' memory, and pid 1's
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    # keys, shared by whoever has the user's or the session's keyring
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    # large and often broken
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "fanotify_init": (300, 262),
    "modify_ldt": (154, None),
    "memfd_secret": (447, 447),
    "lookup_dcookie": (212, 18),
    "uselib": (134, None),
    # mounts and namespaces
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "open_tree_attr": (467, 467),
    "unshare": (272, 97),
    "setns": (308, 268),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    # the machine
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "acct": (163, 89),
    "syslog": (103, 116),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "clock_adjtime": (305, 266),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "vhangup": (153, 58),
    "iopl": (172, None),
    "ioperm": (173, None),
}
_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # AUDIT_ARCH_*
# What makes a sandbox needs these, before it gives up every capability and so can't use them any more.
_MAKING = frozenset({"mount", "umount2", "pivot_root", "chroot", "unshare", "setns", "sethostname"})
_CLONE, _CLONE3, _IOCTL, _SOCKET, _SOCKETPAIR = (56, 220), (435, 435), (16, 29), (41, 198), (53, 199)
_PRLIMIT = (302, 261)  # of another process: a limit that is below what it has used has the kernel kill it
_NAMESPACES = 0x7E020000  # CLONE_NEWNS, CGROUP, UTS, IPC, USER, PID, NET
_TERMINAL = (0x5412, 0x541C)  # TIOCSTI and TIOCLINUX type into somebody's terminal
# AF_UNIX, AF_INET, AF_INET6. Others have kernel bugs; AF_VSOCK knows no network namespace, and what lies in
# the buffers of AF_NETLINK, with which a sandbox is made, is charged to no control group.
_FAMILIES = (1, 2, 10)
_NETLINK = 16
_X32 = 0x40000000  # the bit of x86_64's other set of numbers

_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06  # BPF_LD|W|ABS, JMP|JEQ|K, JMP|JSET|K, RET|K
_NUMBER, _ARCHITECTURE, _ARGUMENT_0, _ARGUMENT_1 = 0, 4, 16, 24  # low words in struct seccomp_data
_ALLOW = 0x7FFF0000
_ERRNO = 0x00050000

# fcntl, flock, inotify_init (where there is one) and inotify_init1, from the kernel's tables.
_TELLTALE = {"x86_64": (72, 73, 253, 294), "aarch64": (25, 32, 26)}
_TELLTALE_COMMANDS = (5, 36, 37, 38, 1026)  # of fcntl: F_GETLK, F_OFD_*, which /proc/locks shows, F_NOTIFY

Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, operand


def deny_list(machine: str = "", *, making: bool = False) -> bytes | None:
    """The filter as an array of struct sock_filter; None where this machine's system calls aren't known.

    ``making``: what makes namespaces and mounts is allowed, and still denied once ``deny_list()`` is added.
    """
    machine = machine or platform.machine()
    if machine not in _ARCHITECTURES:
        return None
    at = list(_ARCHITECTURES).index(machine)
    refuse = (_RETURN, 0, 0, _ERRNO | errno.EPERM)
    program: list[Instruction] = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, _ARCHITECTURES[machine]),  # else 32-bit calls, whose numbers mean others
        refuse,
        (_LOAD, 0, 0, _NUMBER),
    ]
    if machine == "x86_64":
        program += [(_ANY_BIT, 0, 1, _X32), refuse]
    for name, numbers in _DENIED.items():
        number = numbers[at]
        if number is not None and not (making and name in _MAKING):
            program += [(_EQUAL, 0, 1, number), refuse]
    # Its flags lie in memory, so it can't be told apart: without it, the C library takes clone.
    program += [(_EQUAL, 0, 1, _CLONE3[at]), (_RETURN, 0, 0, _ERRNO | errno.ENOSYS)]
    if not making:
        program += _for(_CLONE[at], [(_LOAD, 0, 0, _ARGUMENT_0), (_ANY_BIT, 0, 1, _NAMESPACES), refuse])
    program += _for(
        _IOCTL[at], [(_LOAD, 0, 0, _ARGUMENT_1), *_one_of(_TERMINAL, (_RETURN, 0, 0, _ERRNO | errno.EPERM))]
    )
    program += _for(_PRLIMIT[at], [(_LOAD, 0, 0, _ARGUMENT_0), (_EQUAL, 1, 0, 0), refuse])
    unsupported = (_RETURN, 0, 0, _ERRNO | errno.EAFNOSUPPORT)
    for number in (_SOCKET[at], _SOCKETPAIR[at]):
        families = (*_FAMILIES, _NETLINK) if making else _FAMILIES
        allowed = _one_of(families, (_RETURN, 0, 0, _ALLOW))
        program += _for(number, [(_LOAD, 0, 0, _ARGUMENT_0), *allowed, unsupported])
    program.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def telltale_filter() -> bytes:
    """The filter for untrusted code, and before it what runs could tell one another through files of all.

    A lock on a file of /usr that another run can see, or notice of its being read. b"" where the machine's
    system calls aren't known.
    """
    known = deny_list()
    if known is None or platform.machine() not in _TELLTALE:
        return b""
    refuse = (_RETURN, 0, 0, _ERRNO | errno.ENOLCK)
    fcntl, *calls = _TELLTALE[platform.machine()]
    program: list[Instruction] = [(_LOAD, 0, 0, _NUMBER)]
    for number in calls:
        program += [(_EQUAL, 0, 1, number), refuse]
    program += [(_EQUAL, 0, 2 * len(_TELLTALE_COMMANDS) + 1, fcntl), (_LOAD, 0, 0, _ARGUMENT_1)]
    for command in _TELLTALE_COMMANDS:
        program += [(_EQUAL, 0, 1, command), refuse]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program) + known


def _for(number: int, body: list[Instruction]) -> list[Instruction]:
    """``body``, which may overwrite the number, for one system call; it is allowed at its end."""
    return [(_EQUAL, 0, len(body) + 1, number), *body, (_RETURN, 0, 0, _ALLOW)]


def _one_of(values: tuple[int, ...], then: Instruction) -> list[Instruction]:
    return [instruction for value in values for instruction in ((_EQUAL, 0, 1, value), then)]
