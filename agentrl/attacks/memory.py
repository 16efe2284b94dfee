"""Attacks on the limit of memory, wherever the kernel keeps it."""

from __future__ import annotations

from typing import Any

from agentrl.attacks.attack import Attack

__all__ = ["MEMORY"]

_MEMORY: dict[str, Any] = {"needs": ("memory_mib",), "statuses": ("memory",), "finishes": False}

MEMORY: tuple[Attack, ...] = (
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
        name="memory-in-ip-sockets",
        group="resources",
        tries="let the kernel hold it in connections to oneself that nobody reads",
        source="""
import socket
from probe import *
held, total = [], 0
server = socket.create_server(("127.0.0.1", 0), backlog=100)
try:
    for _ in range(300):
        client = socket.create_connection(server.getsockname(), timeout=0.5)
        held += [client, server.accept()[0]]
        client.setblocking(False)
        try:
            while total < 400 << 20:
                total += client.send(bytes(1 << 18))
        except BlockingIOError:
            pass
except OSError:
    pass
if total >= 400 << 20:
    broke("400 MiB lie in connections")
done()
""",
        needs=("memory_mib",),
        statuses=("ok", "memory"),
    ),
    Attack(
        name="memory-in-netlink-sockets",
        group="resources",
        tries="let the kernel hold it in messages to oneself over netlink",
        source="""
import socket
from probe import *
held, total = [], 0
try:
    sender = socket.socket(16, socket.SOCK_RAW, 2)
    sender.bind((0, 0))
    sender.setblocking(False)
    while total < 200 << 20:
        receiver = socket.socket(16, socket.SOCK_RAW, 2)
        receiver.bind((0, 0))
        held.append(receiver)
        try:
            while True:
                total += sender.sendto(bytes(100_000), (receiver.getsockname()[0], 0))
        except BlockingIOError:
            pass
except OSError:
    pass
if total >= 150 << 20:
    broke(f"{total >> 20} MiB lie in netlink")
done()
""",
        needs=("memory_mib",),
        statuses=("ok", "memory"),
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
)
