"""The bubblewrap backend, for real: each limit, each promise, and that nothing is left behind."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from agentrl.errors import BadConfig
from agentrl.registry import make_sandbox
from agentrl.sandbox import GUARANTEES, LIMITS, Backend, Channel, ExecResult, Limits, Sandbox, SandboxLost
from agentrl.sandboxing import bwrap_process

pytestmark = pytest.mark.bwrap

_LIMITS = Limits(cpu_s=20, wall_s=60, memory_mib=256, pids=32, disk_mib=16, output_kib=64)


@pytest.fixture(scope="module")
def backend() -> Iterator[Backend]:
    made = make_sandbox("bubblewrap")
    survey = made.survey()
    if not survey.available or survey.missing:
        pytest.skip(survey.note if not survey.available else str(survey.missing))
    yield made
    made.close()


@pytest.fixture
def sandbox(backend: Backend) -> Iterator[Sandbox]:
    made = backend.open(_LIMITS)
    yield made
    made.close()


def _python(sandbox: Sandbox, code: str, **limits: float | None) -> ExecResult:
    return sandbox.run(["python3", "-c", code], limits=replace(_LIMITS, **limits))  # type: ignore[arg-type]


def _said(result: ExecResult) -> str:
    assert result.status == "ok", result
    return result.stdout.decode()


def _processes(word: str) -> list[Path]:
    """The host's processes whose command lines contain ``word``, but this one, in /proc."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if word in line and str(os.getpid()) != path.parent.name:
            found.append(path.parent)
    return found


def _parent(process: Path) -> int:
    return int((process / "stat").read_text().rpartition(")")[2].split()[1])


def _left_of(mark: str) -> list[Path]:
    """Folders and control groups that have ``mark`` in their names."""
    return [
        *Path("/run/agentrl").glob(f"*-{mark}-*"),
        *Path("/sys/fs/cgroup").glob(f"agentrl-*-{mark}-*"),
        *Path("/sys/fs/cgroup").glob(f"*/agentrl-*-{mark}-*"),
    ]


# -- what a run is --


def test_a_host_that_has_all_enforces_all(backend: Backend) -> None:
    assert {*backend.survey().enforced} == {*LIMITS, *GUARANTEES}


def test_a_command_has_its_input_output_files_and_exit_code(sandbox: Sandbox) -> None:
    result = sandbox.run(
        ["sh", "-c", "cat; cat a/b; echo err >&2; echo out > made; exit 3"], stdin=b"in ", files={"a/b": b"f"}
    )
    assert (result.status, result.fault, result.exit_code) == ("error", "policy", 3)
    assert (result.stdout, result.stderr, result.truncated) == (b"in f", b"err\n", 0)
    assert sandbox.read("made") == b"out\n"
    assert _said(_python(sandbox, "print(open('made').read())")) == "out\n\n"
    assert 0 < result.cpu_ms < 20_000
    assert result.wall_ms > 0
    assert result.queue_ms > 0
    assert result.peak_bytes > 0


def test_no_variable_of_the_host_is_seen_not_even_in_the_launcher(sandbox: Sandbox) -> None:
    os.environ["AGENTRL_TEST_SECRET"] = "s3cret"
    code = (
        "import glob, os\nprint(sorted(os.environ.items()), os.getcwd())\n"
        "for path in glob.glob('/proc/[0-9]*/environ'): print(open(path, errors='replace').read())"
    )
    said = _said(_python(sandbox, code))
    first = said.split("\n")[0]
    assert first == (
        "[('HOME', '/work'), ('LANG', 'C.UTF-8'), ('PATH', '/usr/local/bin:/usr/bin:/bin'), "
        "('PWD', '/work'), ('TMPDIR', '/tmp')] /work"  # PWD is bubblewrap's own
    )
    assert "s3cret" not in said


def test_a_signal_is_told_from_an_exit_code_and_stderr_is_the_command_s_own(sandbox: Sandbox) -> None:
    for number in (signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM):
        result = _python(sandbox, f"import os; os.kill(os.getpid(), {int(number)})")
        assert (result.status, result.fault, result.signal) == ("signal", "policy", number)
        assert (result.exit_code, result.stderr) == (None, b"")


def test_a_program_that_is_not_there_is_the_policy_s_error(sandbox: Sandbox) -> None:
    for name in ("no-such-program", "exit", "./x"):  # a builtin of a shell is no program
        result = sandbox.run([name])
        assert (result.status, result.fault, result.exit_code) == ("error", "policy", 127)


@pytest.mark.parametrize("argv", [[""], ["-x"], ["--help"], ["./"], ["/etc/passwd"]])
def test_a_name_that_no_program_has_is_the_policy_s_error(sandbox: Sandbox, argv: list[str]) -> None:
    result = sandbox.run(argv)
    assert (result.status, result.fault, result.exit_code) == ("error", "policy", 127)


def test_what_is_no_command_is_refused(sandbox: Sandbox) -> None:
    with pytest.raises(BadConfig, match="is no command"):
        sandbox.run([])


def test_a_pipe_that_nobody_reads_ends_its_writer_as_in_any_shell(sandbox: Sandbox) -> None:
    result = sandbox.run(["sh", "-c", "yes | head -n 1"])
    assert (result.stdout, result.stderr) == (b"y\n", b"")


def test_a_word_with_a_nul_is_not_two_words_of_bubblewrap_s(sandbox: Sandbox) -> None:
    result = sandbox.run(["a\0--share-net"])
    assert (result.status, result.fault, result.exit_code) == ("error", "policy", 127)


def test_a_command_longer_than_the_kernel_takes_is_an_error(sandbox: Sandbox) -> None:
    result = sandbox.run(["echo", "x" * 200_000])
    assert (result.status, result.fault) == ("error", "policy")
    assert len(_said(sandbox.run(["echo", "x" * 60_000]))) == 60_001


def test_a_talk_hears_and_is_heard_and_ends_the_run(sandbox: Sandbox) -> None:
    heard = []

    def talk(channel: Channel) -> None:
        channel.send(b"one\n")
        heard.append(channel.receive(100))

    assert sandbox.run(["cat"], stdin=talk).status == "ok"
    assert heard == [b"one\n"]


def test_a_bug_in_a_talk_comes_out_and_the_next_run_is_well(sandbox: Sandbox) -> None:
    def talk(channel: Channel) -> None:
        channel.receive(1)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        sandbox.run(["sh", "-c", "echo; exec sleep 4711"], stdin=talk)
    assert not _processes("sleep 4711")
    assert sandbox.run(["true"]).status == "ok"


def test_a_run_within_its_own_run_is_told_that_it_cannot_be(sandbox: Sandbox) -> None:
    def talk(channel: Channel) -> None:
        with pytest.raises(BadConfig, match="within the talk"):
            sandbox.run(["true"])

    assert sandbox.run(["cat"], stdin=talk).status == "ok"


def test_closing_within_its_own_run_is_told_that_it_cannot_be(sandbox: Sandbox) -> None:
    with pytest.raises(BadConfig, match="within the talk"):
        sandbox.run(["cat"], stdin=lambda _: sandbox.close())


# -- limits --


def test_cpu_time_is_summed_over_processes(sandbox: Sandbox) -> None:
    result = _python(sandbox, "import os\nos.fork(); os.fork()\nwhile True: pass", cpu_s=1.0)
    assert (result.status, result.fault, result.signal) == ("cpu", "policy", 9)
    assert 1000 <= result.cpu_ms < 4000


def test_the_wall_clock_ends_what_ignores_every_signal(sandbox: Sandbox) -> None:
    code = (
        "import os, signal, time\nfor number in range(1, 65):\n"
        " try: signal.signal(number, signal.SIG_IGN)\n except (OSError, ValueError): pass\n"
        "if os.fork(): os.kill(os.getpid(), signal.SIGSTOP)\ntime.sleep(4712)"
    )
    begun = time.monotonic()
    result = _python(sandbox, code, wall_s=1.0)
    assert (result.status, result.fault, result.signal) == ("wall", "policy", 9)
    assert time.monotonic() - begun < 30
    assert not _processes("time.sleep(4712)")


def test_the_dead_of_earlier_runs_do_not_count(sandbox: Sandbox) -> None:
    few = replace(_LIMITS, pids=3)
    assert {sandbox.run(["true"], limits=few).status for _ in range(30)} == {"ok"}


def test_touched_memory_beyond_the_limit_is_memory(sandbox: Sandbox) -> None:
    result = _python(
        sandbox, "data = bytearray(300 << 20); data[::4096] = b'x' * len(data[::4096])", memory_mib=64
    )
    assert (result.status, result.fault, result.signal) == ("memory", "policy", 9)
    assert 32 << 20 < result.peak_bytes <= 64 << 20


def test_a_child_that_ran_out_of_memory_is_not_hidden_by_its_parent(sandbox: Sandbox) -> None:
    result = _python(
        sandbox,
        "import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'bytearray(b\"x\") * (300 << 20)'])",
        memory_mib=64,
    )
    assert (result.status, result.fault) == ("memory", "policy")


def test_address_space_is_free(sandbox: Sandbox) -> None:
    code = "import mmap; mmap.mmap(-1, 1 << 40, prot=0, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)"
    _said(_python(sandbox, code, memory_mib=64))


def test_a_fork_bomb_is_counted_and_dies(sandbox: Sandbox) -> None:
    code = (
        "import os # bomb 4713\nwhile True:\n try:\n  if not os.fork(): os.setsid(); os.closerange(0, 10)\n"
        " except OSError: pass"
    )
    result = _python(sandbox, code, wall_s=3.0)
    assert result.status in ("wall", "cpu")
    assert result.flags == ("pids_hit",)
    assert not _processes("bomb 4713")


def test_threads_are_counted(sandbox: Sandbox) -> None:
    code = (
        "import threading, time, os\nfor count in range(1000):\n"
        " try: threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
        " except RuntimeError: print(count, flush=True); os._exit(0)"
    )
    result = _python(sandbox, code)
    assert int(_said(result)) == _LIMITS.pids - 1
    assert result.flags == ("pids_hit",)


@pytest.mark.parametrize("folder", ["/work", "/tmp", "/dev/shm"])
def test_every_folder_that_can_be_written_is_full_at_its_size(sandbox: Sandbox, folder: str) -> None:
    code = (
        f"file = open('{folder}/big', 'wb')\nsize = 0\ntry:\n"
        " while size < 100 << 20: size += file.write(bytes(1 << 20)); file.flush()\n"
        "except OSError as error: print(error.errno, size >> 20)"
    )
    number, mib = _said(_python(sandbox, code)).split()
    assert number == "28"
    assert 15 <= int(mib) <= 17


def test_nothing_else_can_be_written(sandbox: Sandbox) -> None:
    code = (
        "import os\nfor top, folders, files in os.walk('/'):\n"
        " folders[:] = [name for name in folders if (top, name) not in (('/', 'proc'), ('/', 'usr'))]\n"
        " if os.access(top, os.W_OK): print(top)\n"
        "for top in ('/usr', '/usr/bin', '/proc', '/proc/sys/kernel'):\n"
        " if os.access(top, os.W_OK): print(top)\n"
        "for path in ('/proc/sysrq-trigger', '/proc/sys/kernel/core_pattern'):\n"
        " if os.access(path, os.W_OK): print(path)\n"
        "try: open('/dev/pts/file', 'w')\nexcept OSError: pass\nelse: print('/dev/pts/file')"
    )
    said = set(_said(_python(sandbox, code)).split("\n"))
    assert said - {"/dev/pts"} == {"/work", "/tmp", "/dev/shm", ""}


def test_a_million_files_stop_somewhere_and_are_gone_soon(sandbox: Sandbox) -> None:
    code = "for number in range(10**6): open(f'/work/{number}', 'w').close()"
    result = _python(sandbox, code, wall_s=30.0)
    assert (result.status, result.fault) == ("error", "policy")
    assert b"No space left" in result.stderr
    begun = time.monotonic()
    sandbox.close()
    assert time.monotonic() - begun < 10


def test_files_that_cannot_be_written_for_lack_of_room_are_the_policy_s_error(sandbox: Sandbox) -> None:
    _python(sandbox, "try: open('big', 'wb').write(bytes(100 << 20))\nexcept OSError: pass")
    result = sandbox.run(["true"], files={"test.py": bytes(8192)})
    assert (result.status, result.fault) == ("error", "policy")
    assert b"can't be written" in result.stderr


def test_descriptors_end_at_a_thousand(sandbox: Sandbox) -> None:
    code = "import os\ntry:\n while True: last = os.dup(0)\nexcept OSError as error: print(error.errno, last)"
    assert _said(_python(sandbox, code)) == "24 1023\n"


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_endless_output_ends_the_run(sandbox: Sandbox, stream: str) -> None:
    result = _python(sandbox, f"import sys\nwhile True: sys.{stream}.write('x' * 10000)")
    assert (result.status, result.fault, result.signal) == ("output", "policy", 9)
    assert len(getattr(result, stream)) == 64 << 10
    assert result.truncated > 15 * 64 << 10


def test_a_run_may_have_less_than_its_sandbox_and_the_next_all_again(sandbox: Sandbox) -> None:
    hog = "data = bytearray(100 << 20); data[::4096] = b'x' * len(data[::4096])"
    assert _python(sandbox, hog, memory_mib=64).status == "memory"
    assert _python(sandbox, hog).status == "ok"
    with pytest.raises(BadConfig, match="memory_mib=300"):
        _python(sandbox, "pass", memory_mib=300)
    with pytest.raises(BadConfig, match="has the disk and the network of its session"):
        _python(sandbox, "pass", disk_mib=4)


def test_less_memory_than_the_files_take_is_the_policys_and_changes_nothing(sandbox: Sandbox) -> None:
    assert _python(sandbox, "open('big', 'wb').write(bytes(12 << 20))").status == "ok"
    result = _python(sandbox, "pass", memory_mib=4, pids=4)
    assert (result.status, result.fault) == ("memory", "policy")
    assert _python(sandbox, _TEN_THREADS).status == "ok"


def test_files_that_leave_no_memory_to_start_in_are_the_policys_and_nobody_elses(backend: Backend) -> None:
    most = replace(_LIMITS, memory_mib=32, disk_mib=32)
    full, other = backend.open(most), backend.open(_LIMITS)
    try:
        assert full.run(["head", "-c", "20M", "/dev/zero"], limits=most).status == "output"
        assert full.run(["sh", "-c", "head -c 20M /dev/zero > big"]).status == "ok"
        seen = []
        for kib in range(0, 2400, 40):  # each fails at another step of bubblewrap's, or of who starts it
            allowed = replace(most, memory_mib=20 + kib / 1024)
            seen.append(full.run(["sh", "-c", "echo x >> small"], limits=allowed))
            assert other.run(["true"]).status == "ok"
        assert {(result.status, result.fault) for result in seen[:10]} == {("memory", "policy")}
        assert {(result.status, result.fault) for result in seen} <= {("memory", "policy"), ("ok", "none")}
        assert full.run(["cat", "small"]).status == "ok"
    finally:
        full.close()
        other.close()


_TEN_THREADS = """
import threading
ready = threading.Barrier(11)
for _ in range(10): threading.Thread(target=ready.wait).start()
ready.wait()
"""


# -- isolation --


def test_there_is_no_capability_and_no_way_to_gain_any(sandbox: Sandbox) -> None:
    said = _said(sandbox.run(["cat", "/proc/self/status"]))
    status = dict(line.split(":\t", 1) for line in said.splitlines() if ":\t" in line)
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(status[name], 16) == 0, name
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    assert status["Uid"].split() == ["65534"] * 4
    assert status["Groups"].strip() == ""


def test_the_uid_outside_is_nobody_s(sandbox: Sandbox) -> None:
    owners = []

    def talk(channel: Channel) -> None:
        channel.receive(1)
        owners.extend(path.stat().st_uid for path in _processes("sleep 4714"))

    sandbox.run(["sh", "-c", "echo; sleep 4714"], stdin=talk)
    assert owners
    if os.geteuid() == 0:
        assert min(owners) > 1_000_000_000


def test_user_namespaces_mounts_and_tracing_are_refused(sandbox: Sandbox) -> None:
    code = (
        "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "for name, *arguments in (('unshare', 0x10000000), ('mount', None, b'/', None, 32, None),\n"
        "  ('ptrace', 16, 1, 0, 0), ('setns', 0, 0), ('chroot', b'/tmp')):\n"
        " print(name, getattr(libc, name)(*arguments), ctypes.get_errno())\n"
        "import subprocess; print(subprocess.run(['unshare', '-r', 'true'], stderr=-3).returncode)"
    )
    lines = _said(_python(sandbox, code)).splitlines()
    assert lines[:5] == [f"{name} -1 1" for name in ("unshare", "mount", "ptrace", "setns", "chroot")]
    assert lines[5] != "0"


def test_nothing_of_pid_1_is_seen(sandbox: Sandbox) -> None:
    code = "import os; print(os.listdir('/proc/1'))\ntry: open('/proc/1/mem')\nexcept OSError: print('no')"
    assert _said(_python(sandbox, code)) == "[]\nno\n"


def test_a_lock_tells_other_runs_nothing(sandbox: Sandbox) -> None:
    code = (
        "import fcntl\ntry: fcntl.flock(open('/etc/passwd'), 1)\nexcept OSError as error: print(error.errno)"
    )
    assert _said(_python(sandbox, code)) == "37\n"


def test_only_its_own_processes_are_seen_and_killing_all_kills_but_them(sandbox: Sandbox) -> None:
    said = _said(_python(sandbox, "import os; print(len([x for x in os.listdir('/proc') if x.isdigit()]))"))
    assert int(said) == 2  # pid 1 and Python
    for code in (
        "import os; os.kill(1, 9); os.kill(-1, 9); print('alive')",
        "import os; os.kill(os.getppid(), 9); print('alive')",
    ):
        assert _python(sandbox, code).fault in ("none", "policy")
    result = sandbox.run(["sh", "-c", "sh -c 'kill -9 -1'; echo done"])
    assert (result.status, result.fault, result.signal) == ("signal", "policy", 9)


def test_the_host_s_files_and_sockets_are_not_there(sandbox: Sandbox, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s3cret")
    paths = [
        "/run", "/var", "/root", "/home", "/sys", "/boot", "/etc/shadow", "/run/docker.sock", "/dev/kvm",
        "/dev/mem", "/dev/vda", "/dev/nvidia0", str(tmp_path), os.getcwd(), f"/proc/{os.getpid()}",
    ]  # fmt: skip
    code = f"import os; print([path for path in {paths!r} if os.path.lexists(path)])"
    assert _said(_python(sandbox, code)) == "[]\n"
    assert "root:x" in _said(sandbox.run(["cat", "/etc/passwd"]))
    assert _said(sandbox.run(["find", "/dev", "-type", "b"])) == ""


def test_no_descriptor_of_the_host_is_open(sandbox: Sandbox) -> None:
    with open("/etc/passwd") as file:
        os.set_inheritable(file.fileno(), True)
        code = "import os; print(os.listdir('/proc/self/fd'), os.isatty(0))"
        said = _said(_python(sandbox, code))
    assert said == "['0', '1', '2', '3'] False\n"  # and the one that it lists with


def test_there_is_no_network_not_even_the_host_s_loopback(sandbox: Sandbox) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        code = (
            "import socket\n"
            f"port = {port}\n"
            "for host in (('127.0.0.1', port), ('169.254.169.254', 80), ('8.8.8.8', 53), ('::1', port)):\n"
            " try: socket.create_connection(host, 2); print('connected', host)\n"
            " except OSError as error: pass\n"
            "try: socket.socket(40, 1); print('vsock')\nexcept OSError: pass\n"
            "try: socket.getaddrinfo('example.com', 80); print('resolved')\nexcept OSError: pass"
        )
        assert _said(_python(sandbox, code)) == ""


def test_abstract_sockets_of_the_host_are_out_of_reach_and_the_network_must_be_asked_for(
    backend: Backend, sandbox: Sandbox
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        code = f"import socket; socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 5)"
        assert _python(sandbox, code).status == "error"
        with pytest.raises(BadConfig, match="network=True"):
            sandbox.run(["true"], limits=replace(_LIMITS, network=True))
        open_one = backend.open(replace(_LIMITS, network=True))
        try:
            assert open_one.run(["python3", "-c", code]).status == "ok"
        finally:
            open_one.close()


def test_sandboxes_share_no_memory_files_and_queues(backend: Backend, sandbox: Sandbox) -> None:
    leave = (
        "import os, subprocess\nfor folder in ('/tmp', '/dev/shm', '/work'): open(folder + '/left', 'w')\n"
        "subprocess.run(['ipcmk', '-M', '100'])"
    )
    _python(sandbox, leave)
    other = backend.open(_LIMITS)
    try:
        look = (
            "import os; print([os.listdir(x) for x in ('/tmp', '/dev/shm', '/work')]); "
            "print(open('/proc/sysvipc/shm').read().count('\\n'))"
        )
        assert _said(other.run(["python3", "-c", look])).split("\n")[:2] == ["[[], [], []]", "1"]
        assert _said(_python(sandbox, look)).split("\n")[:2] == ["[[], [], ['left']]", "1"]
    finally:
        other.close()


def test_ordinary_programs_work(sandbox: Sandbox) -> None:
    code = (
        "import getpass, multiprocessing, os, pwd, subprocess, tempfile, time, zoneinfo\n"
        "with multiprocessing.Pool(2) as pool: assert pool.map(abs, [-1]) == [1]\n"
        "assert subprocess.check_output(['awk', 'BEGIN { print 2 }']) == b'2\\n'\n"
        "assert tempfile.NamedTemporaryFile().name.startswith('/tmp')\n"
        "assert pwd.getpwuid(os.getuid()).pw_dir == os.path.expanduser('~') == '/work'\n"
        "master, slave = os.openpty()\nprint('fine')"
    )
    assert _said(_python(sandbox, code)) == "fine\n"


# -- files between host and sandbox --


def test_links_lead_nowhere_from_outside(sandbox: Sandbox) -> None:
    sandbox.run(["sh", "-c", "ln -s /etc/shadow link; ln -s / folder; mkfifo pipe; mkdir real"])
    for path in ("link", "folder/etc/passwd", "pipe", "real"):
        with pytest.raises(FileNotFoundError):
            sandbox.read(path)
    sandbox.write("link", b"ours")
    assert _said(sandbox.run(["cat", "link"])) == "ours"
    result = sandbox.run(["sh", "-c", "rm link && echo x > a/b && chmod 700 a"], files={"a/b": b""})
    assert result.status == "ok", result.stderr


# -- nothing is left --


def test_a_daemon_does_not_outlive_its_run(sandbox: Sandbox) -> None:
    result = sandbox.run(["sh", "-c", "setsid sh -c 'sleep 4715; echo x > /work/late' & exit 0"])
    assert result.status == "ok"
    assert not _processes("sleep 4715")


def test_closing_from_another_thread_ends_a_run(sandbox: Sandbox) -> None:
    timer = threading.Timer(1.0, sandbox.close)
    timer.start()
    result = sandbox.run(["sleep", "4716"])
    timer.join()
    assert (result.status, result.fault) == ("lost", "world")
    assert not _processes("sleep 4716")
    with pytest.raises(SandboxLost, match="closed"):
        sandbox.run(["true"])


def test_bubblewrap_killed_by_somebody_outside_is_the_world_s_fault(sandbox: Sandbox) -> None:
    def talk(channel: Channel) -> None:
        channel.receive(1)
        found = {int(path.name): _parent(path) for path in _processes("echo; exec sleep 4717")}
        (outer,) = found.keys() - {pid for pid, parent in found.items() if parent in found}
        os.kill(outer, signal.SIGKILL)
        channel.receive(1)

    result = sandbox.run(["sh", "-c", "echo; exec sleep 4717"], stdin=talk)
    assert (result.status, result.fault) == ("lost", "world")


def test_whoever_starts_bubblewraps_is_started_again(sandbox: Sandbox) -> None:
    def talk(channel: Channel) -> None:
        channel.receive(1)
        (starter,) = [path for path in _processes("bwrap_process.py") if _parent(path) == os.getpid()]
        os.kill(int(starter.name), signal.SIGKILL)
        channel.receive(1)

    result = sandbox.run(["sh", "-c", "echo; exec sleep 4720"], stdin=talk)
    assert (result.status, result.fault) == ("lost", "world")
    assert not _processes("sleep 4720")
    assert sandbox.run(["true"]).status == "ok"


def test_an_interrupt_while_one_is_started_leaves_the_next_run_well(sandbox: Sandbox) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    (starter,) = [path for path in _processes("bwrap_process.py") if _parent(path) == os.getpid()]
    before = signal.signal(signal.SIGALRM, interrupt)
    os.kill(int(starter.name), signal.SIGSTOP)  # so that it comes in the midst of a request
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(KeyboardInterrupt):
            sandbox.run(["sleep", "4722"])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        with suppress(ProcessLookupError):
            os.kill(int(starter.name), signal.SIGCONT)
    for word in ("one", "two"):
        assert _said(sandbox.run(["echo", word])) == word + "\n"
    assert not _processes("sleep 4722")


def test_a_thousand_open_files_more_change_nothing(sandbox: Sandbox) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limits[1] < 4096:
        pytest.skip("fewer than 4096 files may be open")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(limits[0], 4096), limits[1]))
    opened = []
    try:
        opened = [os.open("/dev/null", os.O_RDONLY) for _ in range(1100)]
        assert _said(sandbox.run(["cat"], stdin=b"heard")) == "heard"
        assert _python(sandbox, "while True: pass", wall_s=0.5).status == "wall"
    finally:
        for descriptor in opened:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_too_many_open_files_are_the_world_s_and_nothing_is_left(sandbox: Sandbox) -> None:
    assert sandbox.run(["true"]).status == "ok"
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = os.listdir("/proc/self/fd")
    ends = set()
    for spare in range(20):
        opened = []
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, before)) + 40, limits[1]))
        try:
            with suppress(OSError):
                while True:
                    opened.append(os.open("/dev/null", os.O_RDONLY))
            for _ in range(spare):
                os.close(opened.pop())
            ends.add(
                sandbox.run(["sh", "-c", "test -e x && exec sleep 4723"], files={"x": b""}, limits=_SHORT)
            )
        except SandboxLost as error:
            ends.add(type(error))
        finally:
            for descriptor in opened:
                os.close(descriptor)
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert not _processes("sleep 4723")
        assert os.listdir("/proc/self/fd") == before, spare
    assert {end if end is SandboxLost else end.status for end in ends} == {SandboxLost, "wall"}
    assert sandbox.run(["true"]).status == "ok"


_SHORT = replace(_LIMITS, wall_s=0.2)
_FORKER = """
import os, signal, sys, threading, time
from agentrl.registry import make_sandbox
from agentrl.sandbox import Limits
backend = make_sandbox("bubblewrap")
talks, reads = backend.open(Limits()), backend.open(Limits(wall_s=20))
results, children = [], []
def read():
    results.append(reads.run(["sh", "-c", "sleep 1; wc -c"], stdin=bytes(1 << 20)))
def talk(channel):
    thread = threading.Thread(target=read)
    thread.start()
    time.sleep(0.5)
    children.append(os.fork())
    if not children[-1]:
        time.sleep(60)
        os._exit(0)
    thread.join()
begun = time.monotonic()
talks.run(["cat"], stdin=talk)
backend.close()
print(results[0].status, results[0].stdout, time.monotonic() - begun < 15)
os.kill(children[0], signal.SIGKILL)
"""


def test_a_fork_of_the_host_s_has_no_part_in_its_runs() -> None:
    command = [sys.executable, "-W", "ignore", "-c", _FORKER]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout == "ok b'1048576\\n' True\n", done.stderr


_OWNER = """
import os, sys
from agentrl.sandboxing.owners import this_process
from agentrl.registry import make_sandbox
from agentrl.sandbox import Limits
sandbox = make_sandbox("bubblewrap").open(Limits(wall_s=600))
print(this_process(), flush=True)
def talk(channel):
    channel.receive(1)
    print("running", flush=True)
    channel.receive(1)
sandbox.run(["sh", "-c", "echo; sleep 4718 & setsid sleep 4718"], stdin=talk)
"""


def test_what_a_killed_owner_left_dies_with_it_and_is_swept_by_the_next(backend: Backend) -> None:
    with subprocess.Popen([sys.executable, "-c", _OWNER], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        mark = owner.stdout.readline().strip().split("-", 1)[1]
        assert owner.stdout.readline() == "running\n"
        assert _processes("sleep 4718")
        assert _left_of(mark)
        owner.kill()
    until = time.monotonic() + 20
    while _processes("sleep 4718") and time.monotonic() < until:
        time.sleep(0.05)
    assert not _processes("sleep 4718")
    backend.sweep()  # a test in another process may have swept it, so that it says 0
    assert not _left_of(mark)
    assert mark not in Path("/proc/mounts").read_text()


def test_closing_the_backend_leaves_nothing_and_it_opens_again(backend: Backend) -> None:
    own = make_sandbox("bubblewrap")
    descriptors = len(os.listdir("/proc/self/fd"))
    threads = threading.active_count()
    for _ in range(2):
        sandbox = own.open(_LIMITS)
        assert sandbox.run(["true"]).status == "ok"
        before = {path.name for path in _left_of("*")}
        own.close()
        own.close()
        assert len(before) > len({path.name for path in _left_of("*")} & before)
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert threading.active_count() == threads


def test_a_host_without_bubblewrap_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(BadConfig, match="not available here: .*apt install bubblewrap"):
        make_sandbox("bubblewrap").open(Limits())


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes an ordinary user, which takes root")
def test_an_ordinary_user_without_groups_gets_what_can_be_enforced_and_no_more() -> None:
    python = "/usr/bin/python3"  # one that he may run, as he may read this checkout
    may = ["setpriv", "--reuid=4242", "--clear-groups", python, "-I", bwrap_process.__file__]
    if subprocess.run(may, capture_output=True).stderr.count(b"IndexError") != 1:
        pytest.skip("an ordinary user can't run Python or read this checkout")
    script = f"""
import os, sys
from dataclasses import replace
from agentrl.errors import BadConfig
from agentrl.registry import make_sandbox
from agentrl.sandbox import Limits
backend = make_sandbox("bubblewrap")
sys.executable = {python!r}
os.setgroups([]); os.setgid(4242); os.setuid(4242)
survey = backend.survey()
print(sorted(survey.missing), survey.available)
try: backend.open(Limits())
except BadConfig as error: print("refused", "cpu_s=None" in str(error))
limits = Limits(cpu_s=None, memory_mib=None, pids=None, disk_mib=None, wall_s=30)
sandbox = backend.open(limits)
print(sandbox.run(["sh", "-c", "id -u; echo x > file"]).stdout, sandbox.read("file"))
result = sandbox.run(["sh", "-c", "setsid sleep 4719 & sleep 4719"], limits=replace(limits, wall_s=1))
print(result.status, result.signal, result.cpu_ms > 0)
backend.close()
print(os.listdir(os.environ["TMPDIR"] + "/agentrl-4242"))
"""
    with tempfile.TemporaryDirectory() as folder:
        os.chown(folder, 4242, 4242)
        done = subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "TMPDIR": folder},
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.stdout.splitlines() == [
        "['cpu_s', 'disk_mib', 'memory_mib', 'pids'] True",
        "refused True",
        "b'65534\\n' b'x\\n'",
        "wall 9 True",
        "[]",
    ], done.stderr
    assert not _processes("sleep 4719")
