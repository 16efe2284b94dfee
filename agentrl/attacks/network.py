"""Attacks over networks, and from one sandbox to another through what the kernel shares."""

from __future__ import annotations

from typing import Any

from agentrl.attacks.attack import Attack

__all__ = ["CHANNELS_LEFT", "CHANNELS_SOUGHT", "NETWORK"]

_NETWORK: dict[str, Any] = {"group": "isolation", "needs": ("network",)}

NETWORK: tuple[Attack, ...] = (
    Attack(
        name="reach-the-internet",
        tries="TCP, UDP and names; the metadata address of clouds; IPv6",
        source="""
import socket
from probe import *
def tcp(address, family=socket.AF_INET):
    with socket.socket(family, socket.SOCK_STREAM) as client:
        client.settimeout(0.5)
        client.connect(address)
    return address
def udp(address, family=socket.AF_INET):
    with socket.socket(family, socket.SOCK_DGRAM) as client:
        client.sendto(b"x", address)
    return address
for address in (("1.1.1.1", 53), ("8.8.8.8", 443), ("169.254.169.254", 80), ("100.100.100.200", 80)):
    attempt("TCP", lambda address=address: tcp(address))
    attempt("UDP", lambda address=address: udp(address))
for address in (("2606:4700:4700::1111", 53), ("fd00:ec2::254", 80), ("ff02::1", 9999)):
    attempt("TCP6", lambda address=address: tcp(address, socket.AF_INET6))
    attempt("UDP6", lambda address=address: udp(address, socket.AF_INET6))
attempt("DNS", lambda: socket.getaddrinfo("example.com", 80))
done()
""",
        **_NETWORK,
    ),
    Attack(
        name="reach-the-host",
        tries="the host's services on loopback, on its own addresses and on Docker's gateway",
        source="""
import socket
from probe import *
def tcp(family, address):
    with socket.socket(family, socket.SOCK_STREAM) as client:
        client.settimeout(0.5)
        client.connect(address)
        print(client.recv(200))
    return address
ports = (FACTS["port"], 6379, 8265, 8000, 22, 2375, 2376)
for port in ports:
    for host in ("127.0.0.1", "localhost", "0.0.0.0", "172.17.0.1", "172.18.0.1", "10.0.2.2",
        *FACTS["addresses"]):
        attempt("TCP", lambda host=host, port=port: tcp(socket.AF_INET, (host, port)))
    attempt("TCP6", lambda port=port: tcp(socket.AF_INET6, ("::1", port)))
done()
""",
        limits={"wall_s": 30},
        **_NETWORK,
    ),
    Attack(
        name="abstract-sockets",
        tries="the host's Unix sockets without a path",
        source="""
import socket
from probe import *
def connect(name):
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(1)
        client.connect(name)
        print(client.recv(200))
    return name
attempt("an abstract socket", lambda: connect("\\0" + FACTS["abstract"]))
try:
    for line in open("/proc/net/unix"):
        if FACTS["abstract"] in line:
            broke("the host's sockets are listed")
except OSError:
    pass
done()
""",
        **_NETWORK,
    ),
    Attack(
        name="odd-sockets",
        tries="packet, vsock, Bluetooth, CAN, crypto, XDP, netlink and raw sockets",
        source="""
import socket
from probe import *
def vsock():
    with socket.socket(40, socket.SOCK_STREAM) as client:
        client.settimeout(0.5)
        client.connect((2, 22))
    return True
attempt("AF_PACKET", lambda: socket.socket(17, socket.SOCK_RAW, 0x300))
attempt("AF_VSOCK to the host", vsock)
attempt("AF_BLUETOOTH", lambda: socket.socket(31, socket.SOCK_RAW, 1))
attempt("AF_CAN", lambda: socket.socket(29, socket.SOCK_RAW, 1))
attempt("AF_XDP", lambda: socket.socket(44, socket.SOCK_RAW, 0))
attempt("SOCK_RAW", lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 255))
attempt("AF_INET6 raw", lambda: socket.socket(socket.AF_INET6, socket.SOCK_RAW, 58))
attempt("AF_ALG", lambda: socket.socket(38, socket.SOCK_SEQPACKET, 0))
def route():
    import struct
    link = socket.socket(16, socket.SOCK_RAW, 0)
    link.settimeout(1)
    link.bind((0, 0))
    link.send(struct.pack("=IHHIIBxHiII", 32, 16, 5, 1, 0, 0, 0, 1, 1, 0xFFFFFFFF))
    answer = link.recv(4096)
    return struct.unpack_from("=i", answer, 16)[0] == 0
attempt("a link changed through netlink", route)
done()
""",
        **_NETWORK | {"needs": ("network", "privileges")},
    ),
    Attack(
        name="see-the-network",
        tries="list interfaces, routes and connections",
        source="""
import socket
from probe import *
names = [line.partition(":")[0].strip() for line in open("/proc/net/dev").read().splitlines()[2:]]
own = ("lo", "tunl0", "sit0", "ip6tnl0", "gre0", "gretap0", "erspan0", "ip_vti0", "ip6_vti0", "ip6gre0")
others = [name for name in names if name not in own]
if others:
    broke(f"interfaces {others}")
try:
    lines = open("/proc/net/tcp").read().splitlines()[1:] + open("/proc/net/tcp6").read().splitlines()[1:]
    port = "%04X" % FACTS["port"]
    if [line for line in lines if f":{port} " in line]:
        broke("the host's connections are listed")
except OSError:
    pass
done()
""",
        **_NETWORK,
    ),
    Attack(
        name="listen",
        tries="serve on every address, for somebody outside to call",
        source="""
import socket, time
from probe import *
with socket.socket() as server:
    try:
        server.bind(("0.0.0.0", FACTS["free_port"]))
        server.listen()
        server.settimeout(1.5)
        server.accept()
        broke("somebody connected")
    except OSError:
        pass
done()
""",
        **_NETWORK,
    ),
)

# One sandbox leaves a sign wherever it can while another looks for it; both print what they found.
CHANNELS_LEFT = """
import fcntl, glob, mmap, os, socket, time, ctypes
from probe import *
sign = "agentrl-sign-" + FACTS["sign"]
held = []
for folder in ("/dev/shm", "/tmp", "/var/tmp", "/work", "/run", "/dev/mqueue", "/"):
    try:
        held.append(open(os.path.join(folder, sign), "w"))
    except OSError:
        pass
for path in ("/etc/passwd", "/usr/bin/env", "/"):
    try:
        file = os.open(path, os.O_RDONLY)
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held.append(file)
    except OSError:
        pass
libc = ctypes.CDLL(None, use_errno=True)
key = int(FACTS["sign"][:6], 16)
libc.shmget(key, 4096, 0o1666), libc.semget(key, 1, 0o1666), libc.msgget(key, 0o1666)
try:
    libc.mq_open(("/" + sign).encode(), 0o102, 0o666, None)
except AttributeError:
    pass
for arguments in ((b"user", sign.encode(), b"x", 1, -4), (b"user", sign.encode(), b"x", 1, -5)):
    try:
        syscall("add_key", *arguments)
    except OSError:
        pass
server = socket.socket(socket.AF_UNIX)
server.bind("\\0" + sign)
server.listen()
try:
    loop = socket.socket()
    loop.bind(("127.0.0.1", FACTS["free_port"]))
    loop.listen()
except OSError:
    pass
print("LEFT", flush=True)
time.sleep(FACTS["seconds"])
done()
"""
CHANNELS_SOUGHT = """
import fcntl, os, socket, ctypes
from probe import *
sign = "agentrl-sign-" + FACTS["sign"]
for folder in ("/dev/shm", "/tmp", "/var/tmp", "/work", "/run", "/dev/mqueue", "/"):
    if os.path.exists(os.path.join(folder, sign)):
        broke(f"a file of another run in {folder}")
if FACTS["locks"]:
    for path in ("/etc/passwd", "/usr/bin/env", "/"):
        try:
            fcntl.flock(os.open(path, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            broke(f"a lock of another run on {path}")
        except OSError:
            pass
libc = ctypes.CDLL(None, use_errno=True)
key = int(FACTS["sign"][:6], 16)
if libc.shmget(key, 4096, 0) >= 0 or libc.semget(key, 1, 0) >= 0 or libc.msgget(key, 0) >= 0:
    broke("System V memory of another run")
try:
    if libc.mq_open(("/" + sign).encode(), 0) >= 0:
        broke("a message queue of another run")
except AttributeError:
    pass
try:
    if syscall("request_key", b"user", sign.encode(), 0, 0) >= 0:
        broke("a key of another run")
except OSError:
    pass
for family, address in ((socket.AF_UNIX, "\\0" + sign), (socket.AF_INET, ("127.0.0.1", FACTS["free_port"]))):
    try:
        with socket.socket(family) as client:
            client.settimeout(0.5)
            client.connect(address)
        broke(f"a socket of another run: {family.name}")
    except OSError:
        pass
done()
"""
