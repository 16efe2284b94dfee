"""Attacks on the host's files, variables and sockets."""

from __future__ import annotations

from typing import Any

from agentrl.attacks.attack import Attack

__all__ = ["ISOLATION"]

_FILES: dict[str, Any] = {"group": "isolation", "needs": ("files",)}
_ENVIRONMENT: dict[str, Any] = {"group": "isolation", "needs": ("environment",)}

ISOLATION: tuple[Attack, ...] = (
    Attack(
        name="read-the-environment",
        tries="read os.environ",
        source="""
import os
from probe import *
allowed = {"PATH", "HOME", "LANG", "TMPDIR", "PWD", "SHLVL", "_", "LC_CTYPE", "LC_ALL", "AGENTRL_MARK",
           "HOSTNAME", "OLDPWD", "PYTHON_VERSION", "PYTHON_SHA256", "GPG_KEY", "USER", "LOGNAME", "SHELL",
               "TERM"}
more = set(os.environ) - allowed
if more:
    broke(f"variables {sorted(more)}")
print(dict(os.environ))
done()
""",
        **_ENVIRONMENT,
    ),
    Attack(
        name="read-other-environments",
        tries="read /proc/*/environ, that of process 1 first",
        source="""
import glob
from probe import *
for path in glob.glob("/proc/*/environ") + glob.glob("/proc/*/task/*/environ") + ["/proc/1/environ"]:
    try:
        data = open(path, "rb").read()
    except OSError:
        continue
    if FACTS["secret_begins"].encode() in data:
        broke(f"{path} has the secret")
    print(data)
done()
""",
        **_ENVIRONMENT,
    ),
    Attack(
        name="read-ones-own-inherited-memory",
        tries="search one's own memory for what a parent had read before it forked",
        source="""
import re
from probe import *
needle = FACTS["secret_begins"].encode()
with open("/proc/self/maps") as maps, open("/proc/self/mem", "rb", buffering=0) as memory:
    for line in maps:
        area, rights = line.split()[:2]
        first, last = (int(part, 16) for part in area.split("-"))
        if "r" not in rights or last - first > 256 << 20 or first > 1 << 62:
            continue
        try:
            memory.seek(first)
            data = memory.read(last - first)
        except (OSError, OverflowError, ValueError):
            continue
        for place in re.finditer(re.escape(needle) + rb"[0-9a-f]{32}", data):
            broke("the secret lies in memory")
            break
done()
""",
        **_ENVIRONMENT,
        limits={"memory_mib": 512},
    ),
    Attack(
        name="read-a-home",
        tries="read keys and tokens in home folders",
        source="""
import glob, os
from probe import *
homes = [FACTS["home"], "/root", *glob.glob("/home/*"), os.path.expanduser("~root")]
names = (".ssh/id_rsa", ".aws/credentials", ".cache/huggingface/token", ".netrc", ".docker/config.json",
         ".config/gcloud/application_default_credentials.json", ".kube/config", ".bash_history")
for home in homes:
    for name in names:
        try:
            print(open(os.path.join(home, name)).read())
            broke(f"{home}/{name} was read")
        except OSError:
            pass
    if home == FACTS["home"] and os.path.exists(home):
        broke(f"{home} is there")
done()
""",
        **_FILES,
    ),
    Attack(
        name="read-shadow",
        tries="read what only root may, by any path to it",
        source="""
from probe import *
for path in ("/etc/shadow", "/proc/1/root/etc/shadow", "/proc/self/root/etc/shadow",
    "/proc/1/cwd/../etc/shadow",
             "/etc/sudoers", "/etc/gshadow", "/var/lib/docker", "/proc/kcore", "/boot/System.map"):
    attempt(f"{path} read", lambda path=path: bool(open(path, "rb").read(10)))
done()
""",
        **_FILES,
    ),
    Attack(
        name="find-other-rollouts",
        tries="look for the folders of other runs and of the harness",
        source="""
import os
from probe import *
for folder in ("/tmp", "/var/tmp", "/dev/shm", "/run", "/var/run", "/mnt", "/srv", "/opt", "/home"):
    try:
        names = os.listdir(folder)
    except OSError:
        continue
    if [name for name in names if "agentrl" in name or "pytest" in name]:
        broke(f"{folder} has {names[:5]}")
for path, identity in FACTS["paths"].items():
    try:
        status = os.stat(path)
    except OSError:
        continue
    if [status.st_dev, status.st_ino] == identity:
        broke(f"{path} is there")
done()
""",
        **_FILES,
    ),
    Attack(
        name="write-the-system",
        tries="write to /usr, /etc, the interpreter, the standard library and the shell",
        source="""
import json, os, sys
from probe import *
for folder in ("/usr", "/usr/bin", "/etc", "/bin", "/lib", "/", "/opt", "/sys",
    os.path.dirname(json.__file__),
               os.path.dirname(sys.executable), *[path for path in sys.path if path.startswith("/usr")]):
    def work(folder=folder):
        with open(os.path.join(folder, MARK), "w"):
            os.unlink(os.path.join(folder, MARK))
    if os.path.isdir(folder):
        attempt(f"a file in {folder}", work)
for file in (sys.executable, "/bin/sh", "/etc/passwd", "/etc/hosts", "/etc/ld.so.preload", json.__file__):
    attempt(f"{file} opened to write", lambda file=file: os.path.exists(file) and open(file, "ab") and True)
done()
""",
        **_FILES,
    ),
    Attack(
        name="poison-byte-code",
        tries="write __pycache__, .pth and sitecustomize where the next interpreter would find them",
        source="""
import glob, os, site, sys
from probe import *
folders = {*site.getsitepackages(), *glob.glob("/usr/lib/python3*/__pycache__"), *sys.path[1:]}
for folder in folders:
    if os.path.isdir(folder):
        attempt(f"a file in {folder}", lambda folder=folder: os.access(folder, os.W_OK))
done()
""",
        **_FILES,
    ),
    Attack(
        name="connect-to-sockets",
        tries="connect to every Unix socket there is, Docker's and D-Bus's first",
        source="""
import glob, os, socket
from probe import *
paths = ["/run/docker.sock", "/var/run/docker.sock", "/run/dbus/system_bus_socket",
    "/run/containerd/containerd.sock",
         "/run/systemd/private", FACTS["socket"], *glob.glob("/run/**/*sock*", recursive=True)[:50]]
for path in paths:
    def work(path=path):
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(1)
            client.connect(path)
        return path
    attempt("a connection", work)
done()
""",
        **_FILES,
    ),
    Attack(
        name="use-devices",
        tries="make device files and open memory, KVM, disks and GPUs",
        source="""
import glob, os, stat
from probe import *
attempt("mknod of a disk", lambda: os.mknod("disk", 0o600 | stat.S_IFBLK, os.makedev(8, 0)))
attempt("mknod of memory", lambda: os.mknod("/tmp/mem", 0o600 | stat.S_IFCHR, os.makedev(1, 1)))
harmless = {"null", "zero", "full", "random", "urandom", "tty", "ptmx", "console", "stdin", "stdout",
    "stderr"}
for path in glob.glob("/dev/*") + ["/dev/mem", "/dev/kvm", "/dev/fuse", "/dev/kmsg", "/dev/net/tun"]:
    if os.path.basename(path) not in harmless and not os.path.isdir(path):
        attempt(f"{path} opened", lambda path=path: os.open(path, os.O_RDWR | os.O_NONBLOCK))
done()
""",
        **_FILES | {"needs": ("files", "privileges")},
    ),
    Attack(
        name="leaked-descriptors",
        tries="walk out of open descriptors and the working directory's link",
        source="""
import os, stat
from probe import *
for name in os.listdir("/proc/self/fd"):
    number = int(name)
    try:
        mode, target = os.fstat(number).st_mode, os.readlink(f"/proc/self/fd/{name}")
    except OSError:
        continue
    if number > 2 and not target.startswith(("/proc", "/work")) and "/proc/" not in target:
        broke(f"descriptor {number} is {target}")
    if stat.S_ISDIR(mode):
        for path in (f"/proc/self/fd/{name}/../../etc/shadow",
            f"/proc/self/fd/{name}/../../../../etc/shadow"):
            attempt(path, lambda path=path: open(path).read(1))
    if number <= 2 and os.isatty(number):
        broke(f"descriptor {number} is a terminal")
for path in ("/proc/self/cwd/../../../../etc/shadow", "/proc/1/cwd/../../etc/shadow",
    "/proc/1/root/etc/shadow"):
    attempt(path, lambda path=path: open(path).read(1))
done()
""",
        **_FILES,
    ),
    Attack(
        name="compile-from-the-hosts-files",
        tries='#include "/etc/shadow", and other files read while compiling',
        source="""
import os, shutil, subprocess
from probe import *
open("a.c", "w").write('#include "/etc/shadow"\\n#include "%s/.ssh/id_rsa"\\n' % FACTS["home"])
open("a.py", "w").write("x = " + "(" * 5000)
for compiler in ("cc", "gcc", "clang", "tcc", "nim", "go", "rustc"):
    if shutil.which(compiler):
        did = subprocess.run([compiler, "-E", "a.c"], capture_output=True, timeout=4)
        os.write(1, did.stdout[-2000:] + did.stderr[-2000:])
        if b"root:" in did.stdout + did.stderr:
            broke(f"{compiler} showed /etc/shadow")
done()
""",
        **_FILES,
    ),
)
