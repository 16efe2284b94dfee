"""The docker backend over a real engine: results, limits, guarantees, files, talks."""

from __future__ import annotations

import mmap
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress

import pytest
from containers import LIMITS, changed, containers, docker, docker_backend, run_python, said

from agentrl.errors import BadConfig
from agentrl.sandbox import Backend, Channel, ExecResult, Gone, Sandbox, SandboxLost

pytestmark = pytest.mark.docker


@pytest.fixture(scope="module")
def backend() -> Iterator[Backend]:
    made = docker_backend(pool=1)
    yield made
    made.close()


@pytest.fixture
def sandbox(backend: Backend) -> Iterator[Sandbox]:
    session = backend.open(LIMITS)
    yield session
    session.close()


@pytest.fixture(scope="module")
def shared(backend: Backend) -> Sandbox:
    """For runs that leave nothing behind which another could see."""
    return backend.open(LIMITS)


# -- a run --


def test_it_enforces_everything(backend: Backend) -> None:
    survey = backend.survey()
    assert survey.available
    assert not survey.missing


def test_a_command_has_its_output_its_exit_code_and_its_figures(shared: Sandbox) -> None:
    result = shared.run(["sh", "-c", "cat; echo err >&2; exit 3"], stdin=b"in")
    assert (result.status, result.fault, result.exit_code, result.signal) == ("error", "policy", 3, None)
    assert (result.stdout, result.stderr, result.truncated, result.flags) == (b"in", b"err\n", 0, ())
    assert result.wall_ms > 0
    assert result.cpu_ms > 0
    assert result.peak_bytes > 1 << 20


def test_a_command_that_is_not_there_is_the_policys(shared: Sandbox) -> None:
    result = shared.run(["no-such-program"])
    assert (result.status, result.exit_code) == ("error", 127)
    assert b"no-such-program: No such file" in result.stderr


@pytest.mark.parametrize(
    ("code", "number"),
    [
        ("import os; os.abort()", 6),
        ("import ctypes; ctypes.string_at(0)", 11),
        ("import os; os.kill(0, 9)", 9),
    ],
)
def test_a_signal_is_reported(shared: Sandbox, code: str, number: int) -> None:
    result = run_python(shared, code)
    assert (result.status, result.fault, result.signal, result.exit_code) == (
        "signal",
        "policy",
        number,
        None,
    )


def test_sessions_leave_no_descriptor_behind() -> None:
    def opened() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = opened()
    with closing(docker_backend(pool=1)) as made:
        counts = []
        for _ in range(12):
            session = made.open(LIMITS)
            session.run(["true"])
            session.close()
            counts.append(opened())
        # Connections to the engine are kept, up to a number that is soon reached.
        assert max(counts[6:]) <= max(counts[:6]) + 2, counts
    # What other tests left open may open a few of its own meanwhile.
    assert opened() <= before + 4, (before, counts, opened())


def test_files_stay_from_run_to_run_until_it_is_closed(sandbox: Sandbox) -> None:
    sandbox.run(["sh", "-c", "cat a/b > c; echo more >> a/b"], files={"a/b": b"kept"})
    assert sandbox.read("c") == b"kept"
    assert sandbox.run(["cat", "a/b"]).stdout == b"keptmore\n"
    sandbox.close()
    with pytest.raises(SandboxLost, match="closed"):
        sandbox.read("c")
    with pytest.raises(SandboxLost, match="closed"):
        sandbox.run(["true"])


def test_a_large_file_goes_in_and_out(sandbox: Sandbox) -> None:
    data = os.urandom(5 << 20)
    sandbox.write("folder/large", data)
    assert sandbox.read("folder/large", most_bytes=len(data)) == data
    with pytest.raises(OSError, match="File too large"):
        sandbox.read("folder/large")


@pytest.mark.parametrize("path", ["", "/etc/passwd", "../x", "a/../b", "a\0b", "a\nb", "a//b", "x" * 5000])
def test_names_that_lead_elsewhere_are_refused(shared: Sandbox, path: str) -> None:
    for use in (
        lambda: shared.write(path, b""),
        lambda: shared.read(path),
        lambda: shared.run(["true"], files={path: b""}),
    ):
        with pytest.raises(BadConfig, match="names no file of a sandbox"):
            use()


def test_links_and_pipes_are_no_files(sandbox: Sandbox) -> None:
    sandbox.run(
        ["sh", "-c", "ln -s /etc/passwd link; ln -s /etc folder; mkfifo pipe; mkdir real; ln -s . here"]
    )
    for path in ("link", "folder/passwd", "pipe", "real", "none", "here/link"):
        with pytest.raises(FileNotFoundError):
            sandbox.read(path)
    sandbox.write("link", b"ours")
    assert sandbox.read("link") == b"ours"
    with pytest.raises(OSError, match="Not a directory|symbolic"):
        sandbox.write("folder/passwd", b"")
    with pytest.raises(IsADirectoryError):
        sandbox.write("real", b"")


def test_names_of_any_bytes_and_a_hundred_thousand_of_them_do_no_harm(sandbox: Sandbox) -> None:
    made = int(said(sandbox, r"""
import os
open(b"\xff\n", "w").close()
n = 0
try:
    while n < 100_000:
        open(f"f{n}", "w").close()
        n += 1
except OSError as error:
    assert error.errno == 28, error
print(n)
"""))  # fmt: skip
    assert 100 < made < 10_000
    assert sandbox.read("f0") == b""


def test_input_that_is_never_read_does_no_harm(shared: Sandbox) -> None:
    assert shared.run(["true"], stdin=bytes(50 << 20)).status == "ok"
    assert shared.run(["sh", "-c", "exec 0<&-; sleep 0.2"], stdin=bytes(50 << 20)).status == "ok"
    assert shared.run(["sleep", "0.5"], stdin=bytes(50 << 20)).status == "ok"


def test_much_input_arrives(shared: Sandbox) -> None:
    assert shared.run(["wc", "-c"], stdin=bytes(20 << 20)).stdout.strip() == b"20971520"


def test_an_echo_of_much_input_does_not_lock(shared: Sandbox) -> None:
    data = bytes(200_000)
    result = shared.run(["cat"], stdin=data)
    assert result.status == "ok"
    assert len(result.stdout) + result.truncated == len(data)


def test_input_is_at_its_end_where_there_is_none(shared: Sandbox) -> None:
    assert b"EOFError" in run_python(shared, "input()").stderr


def test_head_and_tail_of_an_output_are_kept_and_the_rest_counted(shared: Sandbox) -> None:
    result = shared.run(
        ["sh", "-c", "printf A; head -c 5000 /dev/zero; printf Z"], limits=changed(output_kib=1)
    )
    assert result.status == "ok"
    assert (len(result.stdout), result.truncated) == (1024, 5002 - 1024)
    assert (result.stdout[:1], result.stdout[-1:]) == (b"A", b"Z")


@pytest.mark.parametrize("where", ["", " >&2"])
def test_an_endless_output_ends_the_run(shared: Sandbox, where: str) -> None:
    result = shared.run(["sh", "-c", f"cat /dev/zero{where}"])
    assert (result.status, result.fault) == ("output", "policy")
    assert len(result.stdout + result.stderr) == 16 * 1024


def test_an_endless_output_of_a_daemon_does_not_hide_the_end_of_its_parent(shared: Sandbox) -> None:
    result = shared.run(["sh", "-c", "yes & sleep 0.1; exit 5"])
    assert (result.status, result.exit_code) in (("error", 5), ("output", None))


# -- a talk --


def test_a_talk_hears_and_is_heard(shared: Sandbox) -> None:
    heard = []

    def talk(channel: Channel) -> None:
        for word in (b"one\n", b"two\n"):
            channel.send(word)
            heard.append(channel.receive(100))

    assert shared.run(["cat"], stdin=talk).status == "ok"
    assert heard == [b"one\n", b"two\n"]


def test_a_talk_with_somebody_who_leaves_is_told(shared: Sandbox) -> None:
    heard = []

    def talk(channel: Channel) -> None:
        while True:  # until Gone
            heard.append(channel.receive(100))

    result = shared.run(["sh", "-c", "echo last words; exit 4"], stdin=talk)
    assert (b"".join(heard), result.exit_code) == (b"last words\n", 4)


def test_a_talk_with_somebody_who_hangs_up_is_told_at_once(shared: Sandbox) -> None:
    begun = time.monotonic()
    result = shared.run(["sh", "-c", "exec >&-; sleep 50"], stdin=lambda channel: print(channel.receive(1)))
    assert (result.status, result.fault, result.signal) == ("signal", "policy", 9)
    assert time.monotonic() - begun < 30


def test_a_talk_that_takes_a_limit_for_an_end_does_not_hide_it(shared: Sandbox) -> None:
    def talk(channel: Channel) -> None:
        with suppress(Gone):
            channel.receive(1)

    assert shared.run(["sleep", "50"], stdin=talk, limits=changed(wall_s=0.5)).status == "wall"


@pytest.mark.parametrize("command", ["sleep 60", "yes", "echo; sleep 60 & exit 0"])
def test_a_talk_to_somebody_who_does_not_listen_ends(shared: Sandbox, command: str) -> None:
    result = shared.run(
        ["sh", "-c", command], stdin=lambda channel: channel.send(bytes(10 << 20)), limits=changed(wall_s=2)
    )
    assert result.status in ("wall", "output", "ok")


def test_a_bug_in_a_talk_comes_out_and_nothing_survives(shared: Sandbox) -> None:
    def talk(channel: Channel) -> None:
        raise ZeroDivisionError(channel.receive(100).decode())

    with pytest.raises(ZeroDivisionError):
        shared.run(["sh", "-c", "echo $$; exec sleep 60"], stdin=talk)
    assert said(shared, _PROCESSES) == ""


@pytest.mark.parametrize("what", ["run", "read", "write", "close", "backend"])
def test_a_talk_that_uses_its_own_sandbox_is_told_that_it_can_not(what: str) -> None:
    with closing(docker_backend()) as own, closing(own.open(LIMITS)) as sandbox:
        uses: dict[str, Callable[[], object]] = {
            "run": lambda: sandbox.run(["true"]),
            "read": lambda: sandbox.read("file"),
            "write": lambda: sandbox.write("file", b""),
            "close": sandbox.close,
            "backend": own.close,
        }
        with pytest.raises(BadConfig, match="talk of its own run"):
            sandbox.run(["sleep", "60"], stdin=lambda channel: uses[what]())
        if what in ("run", "read", "write"):
            assert sandbox.run(["echo", "on"]).stdout == b"on\n"


def test_what_is_no_command_is_refused(shared: Sandbox) -> None:
    for argv in ([], "true"):
        with pytest.raises(BadConfig, match="is no command"):
            shared.run(argv)


# -- an exception of a signal's handler --


@contextmanager
def _frozen_and_interrupted(container: str) -> Iterator[None]:
    """What asks the container within it is interrupted; then the container goes on."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, interrupt)
    docker("pause", container)
    timer = threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGUSR1))
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        timer.join()
        with suppress(subprocess.CalledProcessError):  # it was removed
            docker("unpause", container)
        signal.signal(signal.SIGUSR1, before)


_QUESTIONS: dict[str, Callable[[Sandbox], object]] = {
    "read": lambda sandbox: sandbox.read("a"),
    "write": lambda sandbox: sandbox.write("c", b"new"),
    "file of a run": lambda sandbox: sandbox.run(["true"], files={"c": b"new"}),
    "run": lambda sandbox: sandbox.run(["cat", "a"]),
}


@pytest.mark.parametrize("question", [*_QUESTIONS])
def test_an_answer_that_was_not_waited_for_answers_no_other_question(question: str) -> None:
    others = set(containers())
    with closing(docker_backend()) as own, closing(own.open(LIMITS)) as sandbox:
        (container,) = set(containers()) - others
        for name in "ab":
            sandbox.write(name, name.encode())
        with _frozen_and_interrupted(container):
            _QUESTIONS[question](sandbox)
        time.sleep(0.2)  # for the answer to come
        for use in (lambda: sandbox.read("b"), lambda: sandbox.run(["true"])):
            with pytest.raises(SandboxLost, match="was lost"):
                use()


def test_a_run_that_is_interrupted_is_over_and_the_next_is_its_own(sandbox: Sandbox) -> None:
    def interrupt(channel: Channel) -> None:
        channel.receive(4)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sandbox.run(["sh", "-c", "echo one > file; echo one; sleep 60"], stdin=interrupt)
    assert sandbox.read("file") == b"one\n"
    assert sandbox.run(["echo", "two"]).stdout == b"two\n"


# -- limits --


def test_the_wall_clock_ends_a_run(shared: Sandbox) -> None:
    code = "import signal, time\nfor n in (15, 24, 14): signal.signal(n, signal.SIG_IGN)\ntime.sleep(1e6)"
    result = run_python(shared, code, wall_s=0.5)
    assert (result.status, result.fault, result.signal) == ("wall", "policy", 9)
    assert result.wall_ms < 10_000
    stopped = run_python(shared, "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)", wall_s=0.5)
    assert stopped.status == "wall"


def test_cpu_time_is_summed_over_processes(shared: Sandbox) -> None:
    code = "import os\nfor _ in range(3): os.fork()\nwhile True: pass"
    result = run_python(shared, code, cpu_s=1)
    assert (result.status, result.fault) == ("cpu", "policy")
    assert 900 < result.cpu_ms < 5000


def test_a_run_has_the_cpu_time_of_the_runs_before_it_anew(sandbox: Sandbox) -> None:
    code = "import time\nwhile time.process_time() < 0.6: pass"
    for _ in range(3):
        assert run_python(sandbox, code, cpu_s=1.2).status == "ok"


def test_memory_ends_a_run_also_of_a_child(shared: Sandbox) -> None:
    hog = "x = bytearray(300 << 20)"
    assert run_python(shared, hog).status == "memory"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hog!r}]); print('unimpressed')"
    result = run_python(shared, child)
    assert (result.status, result.fault, result.exit_code) == ("memory", "policy", None)
    assert run_python(shared, "x = bytearray(60 << 20)").status == "ok"


def test_address_space_is_free(shared: Sandbox) -> None:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
    assert said(shared, f"import mmap; mmap.mmap(-1, 1 << 40, flags={flags}, prot=0); print(1)") == "1"


def test_a_run_may_lower_memory_and_processes_and_the_next_has_all_again(sandbox: Sandbox) -> None:
    hold = "x = bytearray(60 << 20)"
    assert run_python(sandbox, hold, memory_mib=40).status == "memory"
    assert run_python(sandbox, hold).status == "ok"
    threads = (
        "import threading, time\nfor _ in range(20): threading.Thread(target=time.sleep, args=(0.1,)).start()"
    )
    assert "pids_hit" in run_python(sandbox, threads, pids=8).flags
    assert run_python(sandbox, threads).status == "ok"
    with pytest.raises(BadConfig, match="has the disk and the network of its session"):
        sandbox.run(["true"], limits=changed(disk_mib=4))
    with pytest.raises(BadConfig, match="wall_s=61 in a sandbox opened with 60"):
        sandbox.run(["true"], limits=changed(wall_s=61))


_BOMB = """
import os
while True:
    try:
        if os.fork() == 0:
            os.setsid()
            os.closerange(0, 3)
    except OSError:
        pass
"""
# Numbers of the processes that there are beside the first and the one that looks.
_PROCESSES = (
    "import os; print(*[p for p in os.listdir('/proc') if p.isdigit() and p not in ('1', str(os.getpid()))])"
)


def test_a_fork_bomb_is_held_and_dies(shared: Sandbox) -> None:
    result = run_python(shared, _BOMB, wall_s=1)
    assert (result.status, result.fault) == ("wall", "policy")
    assert "pids_hit" in result.flags
    assert said(shared, _PROCESSES) == ""


def test_a_bomb_of_threads_is_held(shared: Sandbox) -> None:
    code = "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(3,)).start()"
    result = run_python(shared, code, wall_s=10)
    assert result.status == "error"
    assert "pids_hit" in result.flags


def test_disks_are_bounded_and_the_rest_is_read_only(sandbox: Sandbox) -> None:
    fill = r"""
import os
for place in ("/work", "/tmp", "/dev/shm"):
    size = 0
    try:
        with open(place + "/large", "wb", buffering=0) as file:
            while size < 200:
                size += file.write(bytes(1 << 20)) >> 20
    except OSError as error:
        print(place, size, error.errno)
    os.unlink(place + "/large")
for folder, _, _ in os.walk("/"):
    if not folder.startswith(("/proc", "/work", "/tmp", "/dev/shm")):
        try:
            open(folder + "/new", "w").close()
            print("wrote to", folder)
        except OSError:
            pass
"""
    found = said(sandbox, fill).splitlines()
    assert [line.split()[0::2] for line in found if "wrote" not in line] == [
        ["/work", "28"],
        ["/tmp", "28"],
        ["/dev/shm", "28"],
    ]
    assert [line for line in found if "wrote" in line] in ([], ["wrote to /dev/mqueue"])


@pytest.mark.parametrize(("disk_mib", "kib"), [(1.5, 1536), (0.5, 512), (0.0001, 4)])
def test_a_disk_may_be_a_fraction(backend: Backend, disk_mib: float, kib: int) -> None:
    code = (
        "import os\nfor p in ('/work', '/tmp', '/dev/shm'): s = os.statvfs(p); print(s.f_blocks * s.f_frsize)"
    )
    with closing(backend.open(changed(disk_mib=disk_mib, memory_mib=100.5))) as sandbox:
        assert said(sandbox, code).split() == [str(kib << 10)] * 3
        lower = changed(disk_mib=disk_mib, memory_mib=64.25)
        assert sandbox.run(["true"], limits=lower).status == "ok"


def test_a_disk_full_of_files_is_the_policys_and_files_still_come_out(sandbox: Sandbox) -> None:
    full = "open('kept', 'w').write('x')\n"
    full += "f = open('large', 'wb', buffering=0)\nwhile True: f.write(bytes(1 << 16))"
    assert run_python(sandbox, full).status == "error"
    assert sandbox.read("kept") == b"x"
    with pytest.raises(OSError, match="No space left"):
        sandbox.write("more", bytes(1 << 20))


def test_open_files_are_bounded(shared: Sandbox) -> None:
    assert (
        "Too many open files"
        in run_python(shared, "x = [open('/dev/null') for _ in range(10**6)]").stderr.decode()
    )


# -- guarantees --


def test_code_has_no_rights_and_no_way_to_them(shared: Sandbox) -> None:
    code = r"""
import os
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
for key in "Uid Gid Groups CapInh CapPrm CapEff CapBnd CapAmb NoNewPrivs Seccomp".split():
    print(key, *status[key].split())
def attempt(name, work):
    try:
        work()
        print("could", name)
    except OSError:
        pass
attempt("chown", lambda: os.chown("/work", 0, 0))
attempt("setuid", lambda: os.setuid(0))
attempt("mknod", lambda: os.mknod("/work/device", 0o60600, os.makedev(8, 0)))
attempt("memory of 1", lambda: open("/proc/1/mem", "rb"))
attempt("environment of 1", lambda: open("/proc/1/environ", "rb").read(1))
attempt("descriptors of 1", lambda: os.listdir("/proc/1/fd"))
attempt("release_agent", lambda: open("/sys/fs/cgroup/release_agent", "w"))
attempt("sysrq", lambda: open("/proc/sysrq-trigger", "w"))
attempt("core_pattern", lambda: open("/proc/sys/kernel/core_pattern", "w"))
for path in ("/dev/mem", "/dev/kvm", "/dev/sda", "/run/docker.sock", "/var/run/docker.sock", "/root/.ssh"):
    attempt(path, lambda: os.stat(path))
"""
    lines = said(shared, code).splitlines()
    none = "0000000000000000"
    uid = lines[0].split()[1]
    assert int(uid) >= 1 << 12
    assert lines == [
        *(f"{name} {uid} {uid} {uid} {uid}" for name in ("Uid", "Gid")),
        *(line for line in lines if line.startswith("Groups")),
        *(f"{name} {none}" for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")),
        "NoNewPrivs 1",
        "Seccomp 2",
    ]


def test_code_can_neither_trace_nor_kill_the_first_process(shared: Sandbox) -> None:
    code = r"""
import ctypes, os, signal
libc = ctypes.CDLL(None, use_errno=True)
print(libc.ptrace(16, 1, 0, 0), ctypes.get_errno())  # PTRACE_ATTACH
for number in range(1, 65):
    try:
        os.kill(1, number)
    except OSError as error:
        print(number, error)
print("alive")
"""
    assert said(shared, code) == "-1 1\nalive"
    result = run_python(shared, "import os; os.kill(-1, 9)")
    assert result.status in ("ok", "error")  # all others were killed, and there are none
    assert said(shared, "print('still there')") == "still there"


def test_code_can_not_lower_the_limits_of_the_first_process_and_so_of_later_runs(sandbox: Sandbox) -> None:
    lower = "import resource; resource.prlimit(1, resource.RLIMIT_STACK, (4096, 4096))"
    assert b"PermissionError" in run_python(sandbox, lower).stderr
    own = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (99, 99)); print('could')"
    assert said(sandbox, own) == "could"
    assert said(sandbox, "import resource; print(*resource.getrlimit(resource.RLIMIT_NOFILE))") == "1024 1024"


_TAKE_ALL_PIPES = """
import fcntl, os, time
held = []
try:
    while len(held) < 400:
        held += os.pipe()
        fcntl.fcntl(held[-1], 1031, 1 << 20)  # F_SETPIPE_SZ
except OSError as error:
    print(error.errno, flush=True)
time.sleep(60)
"""


def test_a_session_leaves_others_their_share_of_what_the_kernel_counts_by_user(backend: Backend) -> None:
    sizes = []

    def talk(channel: Channel) -> None:
        assert channel.receive(10) == b"1\n"  # EPERM: its share is taken
        code = "import fcntl, os; print(os.getuid(), fcntl.fcntl(os.pipe()[0], 1032))  # F_GETPIPE_SZ"
        for _ in range(3):  # also of those kept ready
            with closing(backend.open(LIMITS)) as other:
                sizes.append(said(other, code).split())

    with closing(backend.open(LIMITS)) as greedy:
        greedy.run(["python3", "-c", _TAKE_ALL_PIPES], stdin=talk)
        uids = {said(greedy, "import os; print(os.getuid())"), *(uid for uid, _ in sizes)}
    assert [size for _, size in sizes] == ["65536"] * 3
    assert len(uids) == 4


def test_there_is_no_network(shared: Sandbox) -> None:
    with socket.create_server(("0.0.0.0", 0)) as server:
        port = server.getsockname()[1]
        code = f"""
import os, socket
print(sorted(os.listdir("/sys/class/net")))
for place in (("127.0.0.1", {port}), ("172.17.0.1", {port}), ("169.254.169.254", 80), ("8.8.8.8", 53)):
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        try:
            s = socket.socket(socket.AF_INET, kind)
            s.settimeout(3)
            s.connect(place)
            if place[0] != "127.0.0.1" or kind == socket.SOCK_STREAM:
                print("reached", place)
        except OSError:
            pass
"""
        assert said(shared, code) == "['lo']"


def test_the_environment_and_the_processes_are_its_own(
    shared: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_OF_THE_HOST", "hunter2")
    code = (
        "import os; print(*sorted(os.environ)); print(os.environ['HOME'], os.environ['TMPDIR'], os.getcwd())"
    )
    assert said(shared, code) == "HOME LANG PATH TMPDIR\n/work /tmp /work"
    assert said(shared, _PROCESSES) == ""


def test_sessions_share_nothing(backend: Backend, shared: Sandbox, sandbox: Sandbox) -> None:
    code = "import os\nfor place in ('/work', '/tmp', '/dev/shm'): open(place + '/mark', 'w').close()"
    assert run_python(sandbox, code).status == "ok"
    look = "import glob; print(*glob.glob('/*/mark') + glob.glob('/dev/shm/mark'))"
    assert said(shared, look) == ""
    assert said(sandbox, look) != ""


def test_what_a_run_leaves_is_dead_when_it_is_over(sandbox: Sandbox) -> None:
    daemon = "(setsid sh -c 'while :; do date >> /work/log; sleep 0.01; done' >/dev/null 2>&1 &) ; sleep 0.3"
    assert sandbox.run(["sh", "-c", daemon]).status == "ok"
    size = len(sandbox.read("log"))
    assert size > 0
    assert said(sandbox, _PROCESSES) == ""
    time.sleep(0.1)
    assert len(sandbox.read("log")) == size
    late = sandbox.run(["sh", "-c", f"{daemon}; sleep 60"], limits=changed(wall_s=1))
    assert late.status == "wall"
    assert said(sandbox, _PROCESSES) == ""


# -- a container that is brought down --

_PESTER_THE_FIRST = """
import os
while True: os.kill(1, 17)  # SIGCHLD: that it must look at
"""
_STARVE_THE_FIRST = """
import os
os.sched_setscheduler(1, os.SCHED_IDLE, os.sched_param(0))
for _ in range(5): os.fork()
while True: pass
"""
_FILL_MEMORY_WITH_FILES = """
for place in ("/work", "/tmp", "/dev/shm"):
    with open(place + "/large", "wb", buffering=0) as file:
        for _ in range(200): file.write(bytes(1 << 20))
"""


@pytest.mark.parametrize(("code", "wall_s"), [(_PESTER_THE_FIRST, 3), (_STARVE_THE_FIRST, 3)])
def test_code_that_brings_its_container_down_has_failed(backend: Backend, code: str, wall_s: int) -> None:
    sandbox = backend.open(changed(pids=64))
    sandbox.write("file", b"")
    result = run_python(sandbox, code, pids=64, wall_s=wall_s)
    assert result.fault == "policy", result
    assert result.status in ("signal", "wall", "cpu", "memory")
    assert sandbox.run(["echo", "on"]).stdout == b"on\n"
    if "container_died" in result.flags:
        with pytest.raises(FileNotFoundError):
            sandbox.read("file")
    sandbox.close()


def test_memory_full_of_files_is_the_policys(backend: Backend) -> None:
    limits = changed(memory_mib=32, disk_mib=64)
    sandbox = backend.open(limits)
    result = sandbox.run(["python3", "-c", _FILL_MEMORY_WITH_FILES])
    assert (result.status, result.fault) == ("memory", "policy")
    with pytest.raises(FileNotFoundError):
        sandbox.read("none")
    with suppress(OSError):  # there may be room
        sandbox.write("file", bytes(1 << 20))
    assert sandbox.run(["true"]).fault in ("none", "policy")
    sandbox.close()


def test_no_log_grows_on_the_host(sandbox: Sandbox) -> None:
    kinds = []
    for container in containers():
        with suppress(subprocess.CalledProcessError):  # one that was removed meanwhile
            kinds += docker("inspect", "--format", "{{.HostConfig.LogConfig.Type}}", container).split()
    assert set(kinds) == {"none"}


def test_twenty_at_once_wait_their_turn_and_no_longer(backend: Backend) -> None:
    def one(number: int) -> ExecResult:
        sandbox = backend.open(LIMITS)
        try:
            return sandbox.run(["echo", str(number)])
        finally:
            sandbox.close()

    begun = time.monotonic()
    with ThreadPoolExecutor(20) as threads:
        results = list(threads.map(one, range(20)))
    assert [result.stdout for result in results] == [b"%d\n" % number for number in range(20)]
    assert max(result.wall_ms for result in results) < 10_000
    assert time.monotonic() - begun < 120
