"""The system call filter, on the kernel: what it refuses, and that ordinary Python runs under it."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from agentrl.sandboxing.seccomp import deny_list

_INSTALL = """
import ctypes, os, sys
program = deny_list
libc = ctypes.CDLL(None, use_errno=True)
class Program(ctypes.Structure):
    _fields_ = [("size", ctypes.c_ushort), ("code", ctypes.c_char_p)]
assert libc.prctl(38, 1, 0, 0, 0) == 0
filter = Program(len(program) // 8, program)
assert libc.prctl(22, 2, ctypes.byref(filter), 0, 0) == 0, os.strerror(ctypes.get_errno())
def refused(number, *arguments):
    "The error's name, of a system call."
    import errno
    ctypes.set_errno(0)
    done = libc.syscall(number, *(ctypes.c_long(argument) for argument in arguments))
    return errno.errorcode[ctypes.get_errno()] if done == -1 else "done"
"""

_x86_64 = pytest.mark.skipif(platform.machine() != "x86_64", reason="numbers of x86_64")


def _under_filter(code: str) -> str:
    program = _INSTALL.replace("deny_list", repr(deny_list()), 1) + code
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@_x86_64
@pytest.mark.parametrize(
    ("name", "number", "arguments"),
    [
        ("ptrace PTRACE_TRACEME", 101, (0, 0, 0, 0)),
        ("keyctl", 250, (0, -3, 0)),
        ("bpf", 321, (0, 0, 0)),
        ("io_uring_setup", 425, (8, 0)),
        ("unshare of nothing", 272, (0,)),
        ("mount", 165, (0, 0, 0, 0, 0)),
        ("fsopen", 430, (0, 0)),
        ("clone of a user namespace", 56, (0x10000000, 0, 0, 0, 0)),
        ("ioctl TIOCSTI", 16, (0, 0x5412, 0)),
        ("ioctl TIOCSTI, with high bits that the kernel drops", 16, (0, 0x7_0000_5412, 0)),
        ("prlimit64 of pid 1", 302, (1, 0, 0, 0)),
        ("getpid of the x32 set", 0x40000000 | 39, ()),
    ],
)
def test_calls_that_programs_do_without_are_refused(
    name: str, number: int, arguments: tuple[int, ...]
) -> None:
    assert _under_filter(f"print(refused({number}, *{arguments}))") == "EPERM\n", name


@_x86_64
def test_clone3_is_said_not_to_exist_so_that_clone_is_taken() -> None:
    assert _under_filter("print(refused(435, 0, 0))") == "ENOSYS\n"


def test_sockets_are_of_local_and_ip_families() -> None:
    code = (
        "import socket\nfor family in (1, 2, 10, 40, 38, 17, 16):\n"
        " try: socket.socket(family, socket.SOCK_DGRAM).close(); print(family, 'made')\n"
        " except OSError as error: print(family, error.errno)"
    )
    said = _under_filter(code).split("\n")
    assert said[:3] == ["1 made", "2 made", "10 made"] or said[2] == "10 97"  # hosts without IPv6
    assert said[3:7] == ["40 97", "38 97", "17 97", "16 97"]


def test_ordinary_python_runs_under_it() -> None:
    code = (
        "import asyncio, multiprocessing, numpy, resource, signal, socket, subprocess, tempfile, threading\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))\n"
        "assert multiprocessing.get_context('fork').Pool(2).map(abs, [-1, -2]) == [1, 2]\n"
        "assert subprocess.run(['sh', '-c', 'exit 3']).returncode == 3\n"
        "thread = threading.Thread(target=print, args=('thread',)); thread.start(); thread.join()\n"
        "assert (numpy.eye(200) @ numpy.ones(200)).sum() == 200\n"
        "left, right = socket.socketpair(); left.send(b'x'); assert right.recv(1) == b'x'\n"
        "asyncio.run(asyncio.sleep(0))\n"
        "with tempfile.TemporaryDirectory() as folder: open(folder + '/file', 'w').close()\n"
    )
    assert _under_filter(code) == "thread\n"


def test_another_machine_has_its_own_numbers_and_an_unknown_one_none() -> None:
    assert deny_list("riscv64") is None
    for machine in ("x86_64", "aarch64"):
        program = deny_list(machine)
        assert program is not None
        assert len(program) % 8 == 0
    assert deny_list("x86_64") != deny_list("aarch64")


@_x86_64
def test_what_makes_sandboxes_may_mount_and_unshare_but_nothing_else() -> None:
    code = _INSTALL.replace("deny_list", repr(deny_list(making=True)), 1)
    code += (
        "print(refused(165, 0, 0, 0, 0, 0), refused(272, 0), refused(250, 0, -3, 0), refused(321, 0, 0, 0))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout in ("EFAULT done EPERM EPERM\n", "EPERM done EPERM EPERM\n"), done.stderr
