"""Attacks on what the host reads from a working directory and writes to it."""

from __future__ import annotations

from typing import Any

from agentrl.attacks.attack import Attack

__all__ = ["FILES", "SWAPPER"]

_FILES: dict[str, Any] = {"group": "files", "needs": ("files",)}

FILES: tuple[Attack, ...] = (
    Attack(
        name="links-to-the-host",
        tries="leave links where the host expects files",
        source="""
import os
from probe import *
home = FACTS["home"] + "/.ssh"
os.symlink(home + "/id_rsa", "link")
os.symlink("/etc/shadow", "shadow")
os.symlink(home, "folder")
os.symlink("/proc/self/environ", "environ")
os.symlink("/proc/1/root" + home + "/id_rsa", "root")
os.symlink("link", "chain")
os.symlink("loop", "loop")
os.symlink("/dev/zero", "endless")
os.makedirs("a/b")
os.symlink("../../../../../../" + home, "a/b/c")
done()
""",
        refused=(
            "link",
            "shadow",
            "folder/id_rsa",
            "environ",
            "root",
            "chain",
            "loop",
            "endless",
            "a/b/c/id_rsa",
        ),
        **_FILES,
    ),
    Attack(
        name="no-files-at-all",
        tries="leave pipes, sockets, folders and devices where the host expects files",
        source="""
import os, socket
from probe import *
os.mkfifo("pipe")
socket.socket(socket.AF_UNIX).bind("socket")
os.mkdir("folder")
try:
    os.mknod("device", 0o20666, os.makedev(1, 5))
except OSError:
    pass
done()
""",
        refused=("pipe", "socket", "folder", "device", "none", "pipe/x"),
        **_FILES,
    ),
    Attack(
        name="a-pipe-with-a-writer",
        tries="hold a pipe open that the host would read from for ever",
        source="""
import os, time
from probe import *
os.mkfifo("pipe")
if os.fork() == 0:
    os.setsid()
    with open("pipe", "w") as file:
        while True:
            file.write("x")
done()
""",
        refused=("pipe",),
        **_FILES,
    ),
    Attack(
        name="hard-links-to-the-system",
        tries="take a second name for a read-only file and change it there",
        source="""
import os
from probe import *
for path in ("/etc/passwd", "/usr/bin/env", "/bin/sh", "/etc/shadow"):
    def work(path=path):
        os.link(path, "hard")
        open("hard", "ab").close()
        return True
    attempt(f"{path} linked and opened to write", work)
done()
""",
        **_FILES,
    ),
    Attack(
        name="odd-names",
        tries="names with newlines, invalid UTF-8, control characters and of full length",
        source="""
import os
from probe import *
for name in (b"line\\nbreak", b"\\xff\\xfe", b"\\x1b[2J", "\\u202egnp.exe".encode(), b"x" * 255, b"-rf",
    b"*", b" "):
    open(name, "w").write("x")
deep = b"d"
for _ in range(300):
    try:
        os.mkdir(deep)
        os.chdir(deep)
    except OSError:
        break
done()
""",
        check=lambda seen: "" if seen.seconds < 8 else f"it took {seen.seconds:.0f} s",
        **_FILES,
    ),
    Attack(
        name="unreadable-files-and-folders",
        tries="take all rights from what the host must read and remove",
        source="""
import os
from probe import *
os.makedirs("closed/inner")
open("closed/inner/file", "w").write("x")
open("file", "w").write("x")
os.chmod("file", 0)
os.chmod("closed/inner", 0)
os.chmod("closed", 0)
os.chmod(".", 0o111)
done()
""",
        **_FILES,
    ),
    Attack(
        name="special-bits",
        tries="setuid, setgid and sticky bits, and attributes that forbid removal",
        source="""
import fcntl, os, struct
from probe import *
os.mkdir("group")
os.chmod("group", 0o7777)
open("group/file", "w").write("#!/bin/sh")
os.chmod("group/file", 0o6777)
def immutable():
    with open("group/file") as file:
        fcntl.ioctl(file, 0x40086602, struct.pack("l", 0x10))
    return True
attempt("an immutable file", immutable)
for name, value in (("security.capability", b"\\1\\0\\0\\2\\377\\377\\377\\377" + bytes(12)),
    ("trusted.overlay.opaque", b"y")):
    def mark(name=name, value=value):
        os.setxattr("group/file", name, value)
        return name
    attempt("an attribute", mark)
done()
""",
        needs=("files", "privileges"),
        group="files",
    ),
    Attack(
        name="huge-file",
        tries="leave a sparse file of a terabyte to be read",
        source="""
import os
from probe import *
try:
    os.truncate(os.open("huge", os.O_CREAT | os.O_RDWR), 1 << 40)
except OSError:
    open("huge", "wb").write(bytes(2 << 20))
done()
""",
        refused=("huge",),
        **_FILES,
    ),
    Attack(
        name="change-what-the-host-wrote",
        tries="turn the host's own file into a link while it is the host's",
        source="""
import os
from probe import *
os.unlink("attack.py")
os.symlink("/etc/shadow", "attack.py")
os.unlink("probe.py")
os.mkdir("probe.py")
done()
""",
        refused=("attack.py", "probe.py"),
        **_FILES,
    ),
    Attack(
        name="keep-a-lock",
        tries="lock files so that whoever touches them waits",
        source="""
import fcntl, os, time
from probe import *
file = open("locked", "w")
for lock in (lambda: fcntl.flock(file, fcntl.LOCK_EX), lambda: fcntl.lockf(file, fcntl.LOCK_EX),
             lambda: fcntl.fcntl(file, 1024, 1)):
    try:
        lock()
    except OSError:
        pass
done()
""",
        check=lambda seen: "" if seen.seconds < 5 else f"it took {seen.seconds:.1f} s",
        **_FILES,
    ),
    Attack(
        name="smuggle-descriptors",
        tries="pass an open folder to a later process through a socket that stays behind",
        source="""
import array, os, socket, time
from probe import *
if os.fork() == 0:
    os.setsid()
    server = socket.socket(socket.AF_UNIX)
    server.bind("door")
    server.listen()
    client, _ = server.accept()
    client.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [os.open("/",
        os.O_RDONLY)]))])
    time.sleep(20)
done()
""",
        refused=("door",),
        **_FILES | {"needs": ("files", "survivors")},
    ),
    Attack(
        name="archive-with-bad-members",
        tries="leave an archive with links, devices and names that lead elsewhere (nobody may extract it)",
        source="""
import io, tarfile
from probe import *
with tarfile.open("files.tar", "w") as archive:
    for name, kind, link in (("../" + MARK, tarfile.REGTYPE, ""), ("/tmp/" + MARK, tarfile.REGTYPE, ""),
                             ("link", tarfile.SYMTYPE, FACTS["home"]), ("link/" + MARK, tarfile.REGTYPE, ""),
                             ("hard", tarfile.LNKTYPE, "/etc/shadow"), ("device", tarfile.CHRTYPE, "")):
        member = tarfile.TarInfo(name)
        member.type, member.linkname, member.size = kind, link, 4 if kind == tarfile.REGTYPE else 0
        archive.addfile(member, io.BytesIO(b"evil"))
done()
""",
        **_FILES,
    ),
    Attack(
        name="compressed-bomb",
        tries="leave a small file that unpacks to very much (nobody may unpack it)",
        source="""
import zlib
from probe import *
packer = zlib.compressobj(1)
with open("bomb.zz", "wb") as file:
    for _ in range(200):
        file.write(packer.compress(bytes(1 << 20)))
    file.write(packer.flush())
done()
""",
        **_FILES,
    ),
    Attack(
        name="move-the-working-directory",
        tries="rename or remove the folder that the host works in",
        source="""
import os, shutil
from probe import *
for work in (lambda: os.rename("/work", "/tmp/other"), lambda: os.rename("../work", "../other"),
    lambda: os.rmdir("/work"),
             lambda: os.symlink("/etc", "/work")):
    try:
        work()
    except OSError:
        pass
shutil.rmtree(".", ignore_errors=True)
for name in os.listdir("."):
    if not os.path.isdir(name):
        os.unlink(name)
done()
""",
        **_FILES,
    ),
)

# Swaps a folder for a link and back while the host reads and writes in it.
SWAPPER = """
import os, time
from probe import *
os.makedirs("real", exist_ok=True)
open("real/id_rsa", "w").write("mine")
os.symlink(FACTS["home"] + "/.ssh", "evil")
print("SWAPPING", flush=True)
until = time.monotonic() + 1.2
while time.monotonic() < until:
    for source in ("real", "evil"):
        try:
            os.rename(source, "shown")
            os.rename("shown", source)
        except OSError:
            pass
done()
"""
