"""The zygote backend: what a command can do, what it can't, what becomes of it, and what it leaves behind."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from agentrl.errors import BadConfig
from agentrl.registry import make_sandbox
from agentrl.sandbox import Backend, Channel, ExecResult, Limits, Sandbox, SandboxLost
from agentrl.sandboxing.hierarchy import find
from agentrl.sandboxing.owners import this_process

_LIMITS = Limits(cpu_s=20, wall_s=60, memory_mib=256, pids=32, disk_mib=16, output_kib=64)

Run = Callable[..., ExecResult]


@pytest.fixture(scope="module")
def backend() -> Iterator[Backend]:
    made = make_sandbox("zygote", zygotes=1)
    survey = made.survey()
    if not survey.available or survey.missing:
        pytest.skip(f"no full zygote here: {survey.note} {dict(survey.missing)}")
    yield made
    made.close()


@pytest.fixture
def sandbox(backend: Backend) -> Iterator[Sandbox]:
    opened = backend.open(_LIMITS)
    yield opened
    opened.close()


@pytest.fixture
def python(sandbox: Sandbox) -> Run:
    def run(code: str, *words: str, stdin: bytes = b"", **lower: float) -> ExecResult:
        limits = replace(_LIMITS, **lower) if lower else None
        return sandbox.run(["python3", "-c", code, *words], stdin=stdin, limits=limits)

    return run


def _said(result: ExecResult) -> str:
    assert result.status == "ok", result
    return result.stdout.decode().strip()


# -- commands --


def test_what_a_warm_python_cannot_be_is_executed(sandbox: Sandbox) -> None:
    assert _said(sandbox.run(["python3", "-m", "json.tool"], stdin=b"[1]")) == "[\n    1\n]"
    assert _said(sandbox.run(["python3"], stdin=b"print(5)")) == "5"
    assert _said(sandbox.run(["sh", "-c", "python3 -c 'import sys; print(sys.version)'"])) == _said(
        sandbox.run(["python3", "-c", "import sys; print(sys.version)"])
    )
    assert sandbox.run(["nonesuch"]).exit_code == 127
    assert sandbox.run(["/etc/passwd"]).exit_code == 126


def test_randomness_differs_from_run_to_run(python: Run) -> None:
    code = "import random, uuid, tempfile; print(random.random(), uuid.uuid4(), tempfile.mktemp())"
    assert len({word for _ in range(3) for word in _said(python(code)).split()}) == 9


# -- the session --


def test_files_stay_from_run_to_run_and_what_is_in_tmp_does_not(sandbox: Sandbox) -> None:
    sandbox.run(["sh", "-c", "echo a > kept; echo b > /tmp/gone; echo c > /dev/shm/gone"])
    sandbox.write("d/e", b"ours")
    result = sandbox.run(["sh", "-c", "cat kept d/e; echo more >> d/e; ls /tmp /dev/shm"], files={"f": b""})
    assert _said(result) == "a\nours/dev/shm:\n\n/tmp:"
    assert sandbox.read("d/e") == b"oursmore\n"
    sandbox.close()
    with pytest.raises(SandboxLost):
        sandbox.read("kept")
    with pytest.raises(SandboxLost):
        sandbox.run(["true"])


def test_links_and_pipes_are_no_files(sandbox: Sandbox) -> None:
    sandbox.run(["sh", "-c", "ln -s /etc/passwd link; ln -s /etc folder; mkfifo pipe; ln -s / root"])
    for path in ("link", "folder/passwd", "pipe", "root/etc/passwd"):
        with pytest.raises(FileNotFoundError):
            sandbox.read(path)
    sandbox.write("link", b"ours")
    assert sandbox.read("link") == b"ours"


def test_a_talk_hears_and_is_heard(sandbox: Sandbox) -> None:
    heard = []

    def talk(channel: Channel) -> None:
        for word in (b"1\n", b"20\n"):
            channel.send(word)
            heard.append(channel.receive(100))

    code = "import sys\nfor line in sys.stdin: print(int(line) + 1, flush=True)"
    assert sandbox.run(["python3", "-c", code], stdin=talk).status == "ok"
    assert heard == [b"2\n", b"21\n"]


def test_a_run_may_have_less_than_its_sandbox_and_the_next_all_again(python: Run) -> None:
    hog = "data = bytearray(100 << 20); data[::4096] = b'x' * len(data[::4096])"
    assert python(hog, memory_mib=64).status == "memory"
    assert python(hog).status == "ok"
    with pytest.raises(BadConfig, match="memory_mib=300"):
        python("pass", memory_mib=300)
    with pytest.raises(BadConfig, match="has the disk and the network of its session"):
        python("pass", disk_mib=4)


def test_less_memory_than_the_files_take_is_the_policys_and_changes_nothing(python: Run) -> None:
    assert python("open('big', 'wb').write(bytes(12 << 20))").status == "ok"
    result = python("pass", memory_mib=4, pids=4)
    assert (result.status, result.fault) == ("memory", "policy")
    assert python(_TEN_THREADS).status == "ok"


_TEN_THREADS = """
import threading
ready = threading.Barrier(11)
for _ in range(10): threading.Thread(target=ready.wait).start()
ready.wait()
"""


def test_closing_from_another_thread_ends_a_run(backend: Backend) -> None:
    sandbox = backend.open(_LIMITS)
    timer = threading.Timer(0.5, sandbox.close)
    timer.start()
    result = sandbox.run(["sleep", "50"])
    timer.join()
    assert (result.status, result.fault) == ("lost", "world")
    assert result.wall_ms < 30_000


def test_a_bug_in_a_talk_comes_out_and_nothing_survives(sandbox: Sandbox) -> None:
    def talk(channel: Channel) -> None:
        channel.receive(1)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        sandbox.run(["sh", "-c", "echo; sleep 54321"], stdin=talk)
    assert not _processes("54321")


# -- limits --


def test_cpu_time_is_summed_over_processes(python: Run) -> None:
    result = python("import os\nfor _ in range(4): os.fork()\nwhile True: pass", cpu_s=0.5)
    assert (result.status, result.fault, result.signal) == ("cpu", "policy", 9)
    assert 400 < result.cpu_ms < 10_000


def test_the_wall_clock_ends_what_sleeps_is_stopped_or_ignores_signals(python: Run) -> None:
    deaf = "import signal, os, time\nfor n in range(1, 64):\n    try: signal.signal(n, signal.SIG_IGN)\n"
    deaf += "    except (OSError, ValueError): pass\n"
    stop_all = "os.fork(); time.sleep(0.1); os.kill(-1, signal.SIGSTOP); time.sleep(99)"
    for rest in ("time.sleep(99)", "os.kill(0, signal.SIGSTOP)", stop_all):
        result = python(deaf + rest, wall_s=0.5)
        assert (result.status, result.fault) == ("wall", "policy")


def test_memory_that_is_touched_counts_and_address_space_does_not(python: Run) -> None:
    result = python("x = bytearray(200 << 20)\nfor i in range(0, len(x), 4096): x[i] = 1", memory_mib=64)
    assert (result.status, result.fault) == ("memory", "policy")
    result = python(
        "import mmap; mmap.mmap(-1, 1 << 40, flags=0x4022, prot=0); print('reserved')", memory_mib=64
    )
    assert _said(result) == "reserved"
    assert 1 << 20 < result.peak_bytes < 64 << 20


def test_a_child_that_memory_ran_out_for_counts_too(python: Run) -> None:
    code = "import os\nif os.fork() == 0:\n    x = b'x' * (200 << 20)\nelse:\n    os.wait()"
    assert python(code, memory_mib=64).status == "memory"


@pytest.mark.parametrize(
    "code",
    [
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
        "import os\nwhile True:\n    try:\n        if os.fork() == 0: os.setsid(); os.closerange(0, 99)\n"
        "    except OSError: pass",
        "import threading, time\nwhile True:\n"
        "    try: threading.Thread(target=time.sleep, args=(99,)).start()\n    except RuntimeError: pass",
    ],
)
def test_a_bomb_of_processes_or_threads_is_held_and_dies(sandbox: Sandbox, code: str) -> None:
    result = sandbox.run(["python3", "-c", code + "# 98765"], limits=replace(_LIMITS, wall_s=1.5))
    assert result.status in ("wall", "memory")
    assert "pids_hit" in result.flags
    assert not _inside(sandbox)


@pytest.mark.parametrize("place", ["/work", "/tmp", "/dev/shm"])
def test_no_place_takes_more_than_the_disk_limit(python: Run, place: str) -> None:
    result = python(f"open('{place}/a', 'wb').write(bytes(17 << 20))")
    assert b"No space left on device" in result.stderr
    result = python(f"import os\nfor i in range(10**6): os.close(os.open(f'{place}/{{i}}', os.O_CREAT))")
    assert b"No space left on device" in result.stderr


def test_no_other_place_can_be_written(python: Run) -> None:
    code = """
import os
for folder, folders, files in os.walk('/'):
    if folder.startswith(('/proc', '/work', '/tmp', '/dev/shm')):
        folders.clear()
        continue
    try:
        open(os.path.join(folder, 'x'), 'w')
        print(folder)
    except OSError:
        pass
"""
    assert _said(python(code)) == ""


def test_an_endless_output_ends_the_run_and_open_files_are_limited(python: Run) -> None:
    assert python("while True: print('x' * 999)").status == "output"
    assert python("import sys\nwhile True: print('x' * 999, file=sys.stderr)").status == "output"
    assert b"Too many open files" in python("a = [open('/dev/null') for _ in range(10**6)]").stderr


def test_a_run_may_lower_limits_but_not_raise_them(sandbox: Sandbox) -> None:
    with pytest.raises(BadConfig, match="wall_s=61"):
        sandbox.run(["true"], limits=replace(_LIMITS, wall_s=61))


def test_a_network_is_refused(backend: Backend) -> None:
    with pytest.raises(BadConfig, match="no network"):
        backend.open(replace(_LIMITS, network=True))


# -- guarantees --


def test_it_has_no_rights(python: Run) -> None:
    status = dict(
        line.split(":\t", 1) for line in _said(python("print(open('/proc/self/status').read())")).splitlines()
    )
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(status[name], 16) == 0
    assert (status["NoNewPrivs"], status["Seccomp"], status["Groups"].strip()) == ("1", "2", "")
    assert 0 not in [int(uid) for uid in status["Uid"].split() + status["Gid"].split()]


def test_system_calls_that_need_rights_fail(python: Run) -> None:
    code = """
import ctypes, os, socket
libc = ctypes.CDLL(None, use_errno=True)
def attempt(name, call):
    try:
        result = call()
    except OSError:
        return
    if not (isinstance(result, int) and result < 0):
        print(name, result)
for target in (b'/', b'/usr', b'/work', b'/proc'):
    attempt('remount', lambda: libc.mount(b'none', target, None, 32 | 4096, None))
    attempt('bind', lambda: libc.mount(b'/work', target, None, 4096, None))
    attempt('umount', lambda: libc.umount2(target, 2))
for flag in (0x10000000, 0x20000, 0x20000000, 0x40000000, 0x10020000):
    attempt('unshare', lambda: libc.unshare(flag))
attempt('chroot', lambda: os.chroot('/work'))
attempt('mknod', lambda: os.mknod('/work/d', 0o020666, os.makedev(1, 1)))
attempt('setuid', lambda: os.setuid(0))
attempt('chown', lambda: os.chown('/work', 0, 0))
attempt('raw', lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1))
attempt('packet', lambda: socket.socket(17, socket.SOCK_RAW))
attempt('ptrace', lambda: libc.ptrace(16, 1, 0, 0))
attempt('keyctl', lambda: libc.syscall(250, 0, -3, 1))
attempt('setns', lambda: libc.setns(os.open('/proc/self/ns/net', 0), 0))
attempt('nice', lambda: os.nice(-1))
for path in ('/proc/1/mem', '/proc/1/environ', '/proc/1/root/etc', '/proc/1/cwd', '/proc/1/fd',
             '/proc/1/maps', '/proc/sysrq-trigger', '/proc/kcore', '/proc/kmsg', '/dev/mem', '/dev/kvm',
             '/dev/vda', '/sys'):
    attempt(path, lambda: os.listdir(path) if os.path.isdir(path) else os.open(path, os.O_RDONLY))
for path in ('/proc/sys/kernel/core_pattern', '/proc/self/oom_score_adj', '/usr/bin/env', '/etc/passwd',
             os.sys.executable, os.__file__):
    attempt(path, lambda: os.open(path, os.O_WRONLY))
"""
    assert _said(python(code)) == ""


def test_it_sees_no_process_but_its_own_and_init_is_out_of_reach(python: Run) -> None:
    assert _said(python("import os; print(*[p for p in os.listdir('/proc') if p.isdigit()])")) == "1 2"
    code = """
import os, signal
for pid in (1, -1, os.getppid()):
    for number in (9, 19, 15):
        try: os.kill(pid, number)
        except OSError: pass
print('alive')
"""
    assert _said(python(code)) == "alive"


def test_it_sees_no_file_of_the_host(python: Run, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s")
    places = ("/etc/shadow", "/run", "/var", "/home", "/sys", "/boot")
    hidden = [str(path) for path in (tmp_path, Path.home() / ".ssh", Path(__file__), *places)]
    assert _said(python(f"import os; print(*filter(os.path.exists, {hidden}))")) == ""
    listing = set(_said(python("import os; print(*os.listdir('/'))")).split())
    interpreter = Path(getattr(sys, "_base_executable", sys.executable)).parts[1]
    links = {"bin", "sbin", "lib", "lib32", "lib64", "libx32"}
    assert listing <= {"usr", "etc", "proc", "dev", "tmp", "work", "packages", interpreter, *links}


def test_nothing_is_reached_over_a_network_but_itself(python: Run) -> None:
    with __import__("socket").create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        code = f"""
import socket
for where in (('127.0.0.1', {port}), ('169.254.169.254', 80), ('1.1.1.1', 53), ('::1', {port}, 0, 0)):
    try: socket.create_connection(where[:2], timeout=5); print('reached', where)
    except OSError as error: print(error.errno)
own = socket.create_server(('127.0.0.1', 0))
socket.create_connection(own.getsockname())
print(*[line.partition(":")[0].strip() for line in open("/proc/net/dev").read().splitlines()[2:]])
"""
        *errors, names = _said(python(code)).splitlines()
    assert all(error.isdigit() for error in errors)
    assert names == "lo"


def test_the_name_of_its_control_group_says_nothing(python: Run) -> None:
    assert "agentrl" not in _said(python("print(open('/proc/self/cgroup').read())"))


def test_the_hosts_environment_is_nowhere(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTRL_PLANTED", "environment-secret")
    other = make_sandbox("zygote", zygotes=1)
    try:
        sandbox = other.open(_LIMITS)
        code = "import os; print(sorted(os.environ)); print(open('/proc/self/environ').read())"
        said = _said(sandbox.run(["python3", "-c", code]))
        assert said.startswith("['HOME', 'LANG', 'PATH', 'TMPDIR']\n")
        assert "environment-secret" not in said
        assert (
            _said(sandbox.run(["sh", "-c", "cat /proc/[0-9]*/environ 2>/dev/null; true"])).count("PLANTED")
            == 0
        )
        assert not _found(sandbox, "environment-secret")
    finally:
        other.close()


def test_no_memory_holds_what_the_host_or_an_earlier_run_knew(backend: Backend) -> None:
    kept = "planted-in-" + "the-host"
    first = backend.open(_LIMITS)
    word = "planted-in-" + "a-run"
    code = f"import sys; x = {word!r} * 1000; print(sys.stdin.read(), sys.argv)"
    first.run(["python3", "-c", code, word], stdin=word.encode(), files={"planted-file": word.encode()})
    first.close()
    second = backend.open(_LIMITS)
    try:
        for secret in (kept, word, "planted-file"):
            assert not _found(second, secret)
        assert _found(second, "planted-here", planted="x = ''.join(['planted', '-', 'here'])")
    finally:
        second.close()


def test_no_descriptor_is_inherited(backend: Backend) -> None:
    read, write = os.pipe()
    os.set_inheritable(write, True)
    other = make_sandbox("zygote", zygotes=1)
    try:
        sandbox = other.open(_LIMITS)
        code = "import os; print(*os.listdir('/proc/self/fd'))"
        assert _said(sandbox.run(["python3", "-c", code])) == "0 1 2 3"  # 3: the folder itself
        assert _said(sandbox.run(["sh", "-c", "ls /proc/self/fd | wc -l"])) == "4"
    finally:
        other.close()
        os.close(read)
        os.close(write)


def test_two_sandboxes_share_nothing_to_tell_one_another_by(backend: Backend) -> None:
    one, other = backend.open(_LIMITS), backend.open(_LIMITS)
    leave = """
import ctypes, fcntl, os, socket, struct, sys, time
libc = ctypes.CDLL(None)
for path in ('/tmp/a', '/dev/shm/a', '/work/a'): open(path, 'w').write('told')
libc.shmget(77, 4096, 0o1666); libc.msgget(77, 0o1666); libc.semget(77, 1, 0o1666)
s = socket.socket(socket.AF_UNIX); s.bind('\\0told')
n = socket.socket(); n.bind(('127.0.0.1', 7777)); n.listen()
kept = []
for path in ('/usr/bin/env', '/etc/passwd', '/', '/dev/null', sys.executable, '/proc/self/exe'):
    kept.append(os.open(path, os.O_RDONLY))
    try: fcntl.flock(kept[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError: pass
    try: fcntl.lockf(kept[-1], fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError: pass
    try: fcntl.fcntl(kept[-1], 37, struct.pack('hhqqi4x', fcntl.F_RDLCK, 0, 0, 0, 0)); print('in /proc/locks')
    except OSError: pass
print('left', flush=True)
time.sleep(99)
"""
    look = """
import ctypes, fcntl, os, socket, struct, sys
libc = ctypes.CDLL(None)
print([p for p in ('/tmp/a', '/dev/shm/a', '/work/a') if os.path.exists(p)])
print(libc.shmget(77, 0, 0), libc.msgget(77, 0), libc.semget(77, 0, 0))
for kind, where in ((socket.AF_UNIX, '\\0told'), (socket.AF_INET, ('127.0.0.1', 7777))):
    try: socket.socket(kind).connect(where); print('connected')
    except OSError: pass
for path in ('/usr/bin/env', '/etc/passwd', '/', '/dev/null', sys.executable, '/proc/self/exe'):
    file = os.open(path, os.O_RDONLY)
    try: fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError: print('locked', path)
    except OSError: pass
    try:
        lock = fcntl.fcntl(file, fcntl.F_GETLK, struct.pack('hhqqi4x', fcntl.F_WRLCK, 0, 0, 0, 0))
        if struct.unpack('hhqqi4x', lock)[0] != fcntl.F_UNLCK: print('seen', path)
    except OSError: pass
"""
    seen = []

    def talk(channel: Channel) -> None:
        assert channel.receive(5) == b"left\n"
        seen.append(_said(other.run(["python3", "-c", look])))

    try:
        assert one.run(["python3", "-c", leave], stdin=talk).status == "ok"
    finally:
        one.close()
        other.close()
    assert seen == ["[]\n-1 -1 -1"]


def test_no_process_outlives_its_run(sandbox: Sandbox) -> None:
    result = sandbox.run(["sh", "-c", "setsid sleep 43210 & (setsid sh -c 'sleep 43210 & wait' &) ; exit 0"])
    assert result.status == "ok"
    assert not _processes("43210")
    assert not _inside(sandbox)


def test_ending_init_from_within_does_not_work_and_from_outside_is_the_worlds_fault(sandbox: Sandbox) -> None:
    def talk(channel: Channel) -> None:
        channel.receive(9)
        group = sandbox._group  # type: ignore[attr-defined]
        os.kill(min(group.pids()), signal.SIGKILL)
        channel.receive(1)

    code = "import time; print(1, flush=True); time.sleep(99)"
    result = sandbox.run(["python3", "-c", code], stdin=talk)
    assert (result.status, result.fault) == ("lost", "world")


# -- the zygote's own life --


def test_a_zygote_that_dies_loses_its_runs_and_is_replaced() -> None:
    backend = make_sandbox("zygote", zygotes=1)
    try:
        sandbox = backend.open(_LIMITS)
        zygote = next(iter(backend._zygotes)).pid  # type: ignore[attr-defined]

        def talk(channel: Channel) -> None:
            channel.receive(1)
            os.kill(zygote, signal.SIGKILL)
            channel.receive(1)

        result = sandbox.run(["sh", "-c", "echo; sleep 32109"], stdin=talk)
        assert (result.status, result.fault) == ("lost", "world")
        assert not _processes("32109")
        with pytest.raises(SandboxLost):
            sandbox.run(["true"])
        assert backend.open(_LIMITS).run(["true"]).status == "ok"
    finally:
        backend.close()


def test_a_zygote_is_replaced_after_so_many_sessions() -> None:
    backend = make_sandbox("zygote", zygotes=1, recycle=2)
    try:
        seen = set()
        for _ in range(4):
            sandbox = backend.open(_LIMITS)
            assert sandbox.run(["true"]).status == "ok"
            seen |= {zygote.pid for zygote in backend._zygotes}  # type: ignore[attr-defined]
            sandbox.close()
        assert len(seen) == 2
    finally:
        backend.close()


def test_what_a_killed_host_leaves_ends_by_itself_and_is_swept() -> None:
    code = """
import sys, threading
from agentrl.registry import make_sandbox
from agentrl.sandbox import Limits
backend = make_sandbox("zygote")
sandbox = backend.open(Limits())
def talk(channel):
    print(channel.receive(9), next(iter(backend._zygotes)).pid, flush=True)
    channel.receive(9)
sandbox.run(["sh", "-c", "setsid sleep 21098 & echo; sleep 21098"], stdin=talk)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as host:
        assert host.stdout is not None
        zygote = int(host.stdout.readline().split()[-1])
        until = time.monotonic() + 30
        while len(_processes("21098")) < 2:
            assert time.monotonic() < until
        host.kill()
    while _processes("21098") or Path(f"/proc/{zygote}/root").exists():
        assert time.monotonic() < until
        time.sleep(0.05)
    backend = make_sandbox("zygote")
    backend.sweep()  # or a backend of another process has done it
    left = [path for folder in find().folders.values() for path in folder.glob(f"agentrl-*-{host.pid}-*")]
    assert not left


def test_many_runs_from_many_threads_leave_everything_flat(backend: Backend) -> None:
    def several(most: int) -> None:
        for number in range(most):
            with_file = backend.open(_LIMITS)
            assert _said(with_file.run(["python3", "-c", f"print({number})"])) == str(number)
            with_file.close()

    several(5)
    before = _footprint()
    threads = [threading.Thread(target=several, args=(75,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    until = time.monotonic() + 20
    while _footprint() != before:  # the kernel takes its time with the last
        assert time.monotonic() < until, (_footprint(), before)
        time.sleep(0.1)


def test_imports_that_were_asked_for_are_there_and_others_are_not(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    (tmp_path / "planted_package.py").write_text("value = 6")
    backend = make_sandbox("zygote", packages=[tmp_path], preload=["planted_package"])
    try:
        sandbox = backend.open(_LIMITS)
        code = "import sys; print('planted_package' in sys.modules); import planted_package; "
        code += "print(planted_package.value)"
        assert _said(sandbox.run(["python3", "-c", code])) == "True\n6"
        assert _said(sandbox.run(["sh", "-c", 'exec python3 -c "$0"', code])) == "False\n6"
        assert sandbox.run(["python3", "-c", "import pip"]).status == "error"
    finally:
        backend.close()
    with pytest.raises(BadConfig, match="no zygote starts: .*nonesuch"):
        make_sandbox("zygote", preload=["nonesuch"]).open(_LIMITS)


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user, which root alone may")
def test_an_ordinary_user_gets_every_guarantee_and_no_limit_that_needs_a_group(backend: Backend) -> None:
    if not os.access("/usr/bin/python3", os.X_OK):
        pytest.skip("no interpreter that another user may read")
    code = """
import ctypes, os, sys
from agentrl.registry import make_sandbox
from agentrl.sandbox import GUARANTEES, Limits
import agentrl.sandboxing.zygote_handle
agentrl.sandboxing.zygote_handle._sources()  # what another user may perhaps not read
backend = make_sandbox("zygote")
os.setgroups([]); os.setresgid(12345, 12345, 12345); os.setresuid(12345, 12345, 12345)
ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # so that its files in /proc are its own
sys._base_executable = "/usr/bin/python3"
survey = backend.survey()
if not survey.available:
    sys.exit("skip: " + survey.note)
assert {*survey.enforced} >= {*GUARANTEES, "disk_mib", "wall_s", "output_kib"}, survey
sandbox = backend.open(Limits(**{what: None for what in survey.missing}))
inside = "import os; print(os.getuid()); print(*[p for p in os.listdir('/proc') if p.isdigit()])\\n"
inside += "for number in range(1, 32): os.kill(1, number)\\n"
inside += "open('/work/b', 'w').write('c'); print(open('a').read()); open('/proc/1/environ')"
result = sandbox.run(["python3", "-c", inside], files={"a": b"b"})
print(result.stdout.decode(), sandbox.read("b"), result.stderr.decode().splitlines()[-1])
backend.close()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    if done.stderr.startswith("skip: "):
        pytest.skip(done.stderr)
    assert done.stdout == (
        "65533\n1 2\nb\n b'c' PermissionError: [Errno 13] Permission denied: '/proc/1/environ'\n"
    ), done.stderr


def test_a_forked_process_makes_zygotes_of_its_own(backend: Backend) -> None:
    code = """
import os
from agentrl.registry import make_sandbox
from agentrl.sandbox import Limits
backend = make_sandbox("zygote")
sandbox = backend.open(Limits())
if os.fork() == 0:
    print(backend.open(Limits()).run(["python3", "-c", "print(1)"]).stdout, flush=True)
    backend.close()
    os._exit(0)
os.wait()
print(sandbox.run(["python3", "-c", "print(2)"]).stdout)
backend.close()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "b'1\\n'\nb'2\\n'\n", done.stderr


def _processes(word: str) -> list[int]:
    """Of the whole machine, with ``word`` among their words."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and word.encode() in (folder / "cmdline").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def _inside(sandbox: Sandbox) -> list[int]:
    return list(sandbox._group.pids())  # type: ignore[attr-defined]


def _footprint() -> tuple[int, ...]:
    """Descriptors, children, control groups of this process; of its zygotes, mounts and descriptors."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    grandchildren = [Path(f"/proc/{pid}/task/{pid}/children").read_text().split() for pid in children]
    return (
        len(os.listdir("/proc/self/fd")),
        len(children),
        sum(map(len, grandchildren)),
        sum(len(list(folder.glob(f"agentrl-{this_process()}-*"))) for folder in find().folders.values()),
        *(len(Path(f"/proc/{pid}/mountinfo").read_text().splitlines()) for pid in children),
        *(len(os.listdir(f"/proc/{pid}/fd")) for pid in children),
    )


def _found(sandbox: Sandbox, secret: str, *, planted: str = "") -> bool:
    """Whether a run finds ``secret`` in all of its memory, among all of its objects, or in /proc."""
    half = len(secret) // 2
    code = f"""
{planted}
import gc, sys
needle = bytearray({secret[:half]!r}, 'ascii')  # the whole is never in one place
needle[0] ^= 1
needle += {secret[half:]!r}.encode()
def hit(data):
    at = -1
    while (at := data.find(needle[1:], at + 1)) >= 0:
        if at and data[at - 1] == needle[0] ^ 1:
            return True
    return False
found = False
with open('/proc/self/mem', 'rb', 0) as memory:
    for line in open('/proc/self/maps'):
        begin, end = (int(word, 16) for word in line.split()[0].split('-'))
        if 'r' not in line.split()[1] or '[v' in line:
            continue
        try:
            memory.seek(begin)
            data = memory.read(end - begin)
        except (OSError, OverflowError, ValueError):
            continue
        found |= hit(data)
        del data
print(found)
"""
    return _said(sandbox.run(["python3", "-c", code])) == "True"


# -- what happens to the host's process --


def test_descriptors_above_a_thousand_are_as_good_as_any(sandbox: Sandbox) -> None:
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        assert _said(sandbox.run(["echo", "well"])) == "well"
    finally:
        for descriptor in held:
            os.close(descriptor)


@contextmanager
def _interrupted(after_s: float) -> Iterator[None]:
    """A signal whose handler raises, as Ctrl-C's does."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    old = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, after_s)
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def test_an_interrupt_while_a_zygote_is_asked_mixes_up_no_answers() -> None:
    backend = make_sandbox("zygote", zygotes=1)
    try:
        backend.open(_LIMITS)
        (zygote,) = backend._zygotes  # type: ignore[attr-defined]
        os.kill(zygote.pid, signal.SIGSTOP)
        with _interrupted(0.2):
            backend.open(_LIMITS)
        one, two = backend.open(_LIMITS), backend.open(_LIMITS)
        one.write("mine", b"1")
        two.write("mine", b"2")
        assert (one.read("mine"), two.read("mine")) == (b"1", b"2")
        assert _said(one.run(["cat", "mine"])) == "1"
    finally:
        backend.close()


def test_a_fork_of_this_process_holds_nothing_of_a_run(sandbox: Sandbox) -> None:
    children: list[int] = []

    def fork() -> None:
        children.append(os.fork())
        if not children[-1]:
            time.sleep(20)
            os._exit(0)

    timer = threading.Timer(0.4, fork)
    timer.start()
    began = time.monotonic()
    result = sandbox.run(["sh", "-c", "sleep 1; cat | wc -c"], stdin=b"x" * 200_000)
    timer.join()
    sandbox.close()
    took = time.monotonic() - began
    os.kill(children[0], signal.SIGKILL)
    os.waitpid(children[0], 0)
    assert _said(result) == "200000"
    assert took < 10


@pytest.mark.parametrize("use", ["run", "close"])
def test_a_talk_that_uses_its_own_sandbox_is_told_so(sandbox: Sandbox, use: str) -> None:
    def talk(channel: Channel) -> None:
        sandbox.run(["true"]) if use == "run" else sandbox.close()

    with pytest.raises(BadConfig, match="from within the talk of its own run"):
        sandbox.run(["sleep", "50"], stdin=talk)


@pytest.mark.parametrize("spare", range(0, 14, 2))
def test_nothing_lives_on_where_this_process_has_no_descriptor_left(spare: int) -> None:
    backend = make_sandbox("zygote", zygotes=1)
    word = f"31.4{os.getpid()}{spare}"
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held: list[int] = []
    try:
        sandbox = backend.open(replace(_LIMITS, wall_s=1, cpu_s=1))
        sandbox.run(["true"])
        before = len(os.listdir("/proc/self/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (before + 100, hard))
        with suppress(OSError):
            while True:
                held.append(os.open(os.devnull, os.O_RDONLY))
        for descriptor in held[:spare]:
            os.close(descriptor)
        with suppress(SandboxLost):
            assert sandbox.run(["sleep", word], files={"a": b""}).status == "wall"
    finally:
        for descriptor in held[spare:]:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        time.sleep(0.2)
        alive = subprocess.run(["pgrep", "-f", f"sleep {word}"], capture_output=True, text=True).stdout
        backend.close()
    assert alive == ""


def test_a_run_that_was_over_before_anybody_looked_has_the_pidfd_of_one_that_has_ended() -> None:
    code = """
import os, select, signal
from agentrl.sandboxing.zygote_process import _pidfd_of_the_dead
pidfd = os.dup(_pidfd_of_the_dead())
poll = select.poll()
poll.register(pidfd, select.POLLIN)
assert poll.poll(5000)
try:
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
except ProcessLookupError:
    print("over")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "over\n", done.stderr
