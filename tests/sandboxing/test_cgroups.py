"""Control groups: what this host has, for real; v2's kill on the kernel's v2, its limits on plain files."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agentrl.sandbox import Limits
from agentrl.sandboxing.cgroups import Group
from agentrl.sandboxing.hierarchy import Hierarchy, find

_LIMITS = Limits(memory_mib=64, pids=8)


def _need(hierarchy: Hierarchy, *limits: str) -> Hierarchy:
    for limit in limits:
        if limit in hierarchy.missing:
            pytest.skip(hierarchy.missing[limit])
    return hierarchy


@pytest.fixture
def group() -> Iterator[Group]:
    made = _need(find(), "cpu_s", "memory_mib", "pids").make(_LIMITS)
    yield made
    assert made.close()


def _run(group: Group, code: str) -> tuple[int, str]:
    """Exit code and output of Python inside, which waits until it is in."""
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", f"input()\n{code}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as child:
        group.enter(child.pid)
        output, _ = child.communicate("\n", timeout=60)
    return child.returncode, output


def test_memory_beyond_the_limit_is_a_counted_kill(group: Group) -> None:
    code, _ = _run(group, "data = bytearray(300 << 20); data[::4096] = b'x' * len(data[::4096])")
    assert code == -9
    assert group.oom_kills() >= 1
    assert 32 << 20 < group.peak_bytes() <= 64 << 20


def test_files_in_memory_are_memory(group: Group) -> None:
    path = Path("/dev/shm") / f"agentrl-test-{os.getpid()}"
    try:
        _run(group, f"open({str(path)!r}, 'wb').write(bytes(300 << 20))")
        assert group.oom_kills() >= 1
    finally:
        path.unlink(missing_ok=True)


def test_forks_beyond_the_limit_are_refused_and_counted(group: Group) -> None:
    code, output = _run(
        group,
        "import os, time\ntry:\n    for _ in range(50): os.fork() or (os.close(1), time.sleep(60))\n"
        "except BlockingIOError: print('refused', flush=True)\nos._exit(0)",
    )
    assert (code, output) == (0, "refused\n")
    assert group.pids_hit() >= 1
    assert group.pids()
    group.kill()
    assert not group.pids()


def test_cpu_time_is_summed_over_processes_and_counted_anew_by_begin(group: Group) -> None:
    burn = "while time.process_time() < 0.2: pass"
    _run(group, f"import os, time\nchild = os.fork()\n{burn}\nchild and os.wait()")
    assert group.cpu_s() > 0.35
    group.begin()
    assert group.cpu_s() < 0.1
    assert (group.oom_kills(), group.pids_hit()) == (0, 0)
    assert group.peak_bytes() < 32 << 20


def test_what_enters_is_first_in_line_when_memory_runs_out(group: Group) -> None:
    assert _run(group, "print(open('/proc/self/oom_score_adj').read())")[1].strip() == "1000"


def test_limits_of_a_group_move_both_ways(group: Group) -> None:
    for memory_mib in (32, 128, None, 16):
        group.limit(Limits(memory_mib=memory_mib, pids=None))
    assert _run(group, "bytearray(300 << 20)[::4096]")[0] in (0, -9)
    group.limit(Limits(memory_mib=None))
    assert _run(group, "data = bytearray(100 << 20); data[::4096] = b'x' * len(data[::4096])")[0] == 0


def _fork_bomb(group: Group) -> subprocess.Popen[str]:
    child = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", "input()\nimport os\nwhile True:\n try: os.fork(); os.setsid()\n"
         " except OSError: pass"],
        stdin=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    group.enter(child.pid)
    assert child.stdin is not None
    child.stdin.write("\n")
    child.stdin.close()
    return child


def test_a_fork_bomb_is_killed_from_outside_each_time(group: Group) -> None:
    for _ in range(3):
        bomb = _fork_bomb(group)
        until = time.monotonic() + 20
        while len(group.pids()) < 8 and time.monotonic() < until:
            time.sleep(0.01)
        group.kill()
        assert bomb.wait(10) == -9
        assert not group.pids()
    assert group.remove()  # the kernel's own word that none is left


def test_a_group_that_holds_its_killer_is_left_alone(group: Group) -> None:
    code = (
        "import os\nfrom agentrl.sandbox import Limits, SandboxLost\n"
        "from agentrl.sandboxing.hierarchy import find\n"
        "group = find().make(Limits(memory_mib=None))\ngroup.enter(os.getpid())\n"
        "try: group.kill()\nexcept SandboxLost as error: print(error)\nprint(group.procs[0].parent)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    said, folder = done.stdout.splitlines()
    assert "holds the process that is to kill it" in said, done.stderr
    find().sweep()  # a test in another process may have swept it, so that it says 0
    assert not Path(folder).exists()


_KILLED_OWNER = """
import os, subprocess, sys
from agentrl.sandboxing.hierarchy import find
from agentrl.sandbox import Limits
group = find().make(Limits())
child = subprocess.Popen(["sleep", "600"], start_new_session=True, stdout=subprocess.DEVNULL)
group.enter(child.pid)
print(child.pid, group.procs[0].parent, flush=True)
os.kill(os.getpid(), 9)
"""


def test_groups_of_killed_owners_are_swept_with_their_processes(group: Group) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _KILLED_OWNER], stdout=subprocess.PIPE, text=True, timeout=60
    )
    pid, folder = done.stdout.split()
    find().sweep()  # a test in another process may have swept it, so that it says 0
    assert not Path(folder).exists()
    status = Path(f"/proc/{pid}/status")
    assert not status.exists() or "State:\tZ" in status.read_text()
    assert group.remove()  # ours was left alone, and is empty
    assert not group.procs[0].parent.exists()


def test_without_any_hierarchy_it_is_said_why_and_a_group_does_nothing(tmp_path: Path) -> None:
    (tmp_path / "mountinfo").write_text("23 1 0:1 / /proc rw - proc proc rw\n")
    hierarchy = find(tmp_path)
    assert (hierarchy.version, {*hierarchy.missing}) == (0, {"cpu_s", "memory_mib", "pids"})
    group = hierarchy.make(_LIMITS)
    group.enter(os.getpid()) if os.geteuid() else None
    group.kill()
    assert (group.procs, group.cpu_s(), group.oom_kills(), group.peak_bytes()) == ((), 0.0, 0, 0)
    assert group.close()
    assert hierarchy.sweep() == 0


# -- the kernel's own v2, where it is mounted beside v1 without controllers --


def _real_v2(tmp_path: Path) -> Hierarchy:
    lines = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if " - cgroup2 " in line]
    (tmp_path / "mountinfo").write_text("\n".join(lines))
    (tmp_path / "cgroup").write_text(Path("/proc/self/cgroup").read_text())
    return _need(find(tmp_path), "cpu_s")


@pytest.mark.parametrize("can_kill_at_once", [True, False])
def test_v2_kills_and_counts_cpu_for_real(
    tmp_path: Path, can_kill_at_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not can_kill_at_once:  # a kernel before 5.14
        monkeypatch.setattr(Group, "_kill_at_once", lambda group: False)
    hierarchy = _real_v2(tmp_path)
    group = hierarchy.make(Limits(memory_mib=None, pids=None))
    _run(group, "import time\nwhile time.process_time() < 0.2: pass")
    assert group.cpu_s() > 0.1
    sleepers = [subprocess.Popen(["sleep", "600"], start_new_session=True) for _ in range(3)]
    for sleeper in sleepers:
        group.enter(sleeper.pid)
    group.kill()
    assert [sleeper.wait(10) for sleeper in sleepers] == [-9, -9, -9]
    assert group.close()


# -- v2's limits on a tree of plain files, which takes what is written and says what is put there --


@pytest.fixture
def tree(tmp_path: Path) -> Callable[..., Path]:
    """Makes a v2 tree in which this process is in ``own``; gives its root."""

    def make(own: str, *, root: str = "/", is_root: bool = False) -> Path:
        top = tmp_path / "cgroup root"  # with a space, which mountinfo escapes
        folder = top / own.removeprefix(root).strip("/")
        folder.mkdir(parents=True, exist_ok=True)
        for at in {top, folder}:
            (at / "cgroup.controllers").write_text("cpu memory pids\n")
            (at / "cgroup.subtree_control").write_text("")
            (at / "cgroup.procs").write_text("")
            if not (is_root and at == top):
                (at / "cgroup.events").write_text("populated 1\nfrozen 0\n")
        point = str(top).replace(" ", "\\040")
        (tmp_path / "mountinfo").write_text(f"30 1 0:2 {root} {point} rw shared:4 - cgroup2 cgroup2 rw\n")
        (tmp_path / "cgroup").write_text(f"0::{own}\n")
        return top

    return make


def _kernel_enables(folder: Path) -> None:
    """What the kernel makes of "+memory +pids"."""
    control = folder / "cgroup.subtree_control"
    control.write_text(control.read_text().replace("+", ""))


def test_v2_as_root_makes_groups_at_the_top(tree: Callable[..., Path], tmp_path: Path) -> None:
    top = tree("/user.slice/session-3.scope", is_root=True)
    find(tmp_path)
    assert (top / "cgroup.subtree_control").read_text() == "+memory +pids"
    _kernel_enables(top)
    hierarchy = find(tmp_path)
    assert (hierarchy.version, hierarchy.folders) == (2, {"unified": top})
    assert {*hierarchy.enforced} == {"cpu_s", "memory_mib", "pids"}
    assert not hierarchy.missing


def test_v2_delegated_makes_groups_in_its_own_and_moves_what_is_there_down(
    tree: Callable[..., Path], tmp_path: Path
) -> None:
    top = tree("/user.slice/run-1.scope")
    own = top / "user.slice/run-1.scope"
    find(tmp_path)
    assert (own / "cgroup.subtree_control").read_text() == "+memory +pids"
    assert (own / "agentrl-main").is_dir()
    _kernel_enables(own)
    (tmp_path / "cgroup").write_text("0::/user.slice/run-1.scope/agentrl-main\n")  # where we are now
    hierarchy = find(tmp_path)
    assert hierarchy.folders == {"unified": own}
    assert not hierarchy.missing


def test_v2_in_a_container_that_sees_its_host_s_names(tree: Callable[..., Path], tmp_path: Path) -> None:
    top = tree("/docker/abc", root="/docker/abc")
    assert find(tmp_path).folders == {"unified": top}


def test_v2_that_hands_down_no_memory_says_so(tree: Callable[..., Path], tmp_path: Path) -> None:
    top = tree("/", is_root=True)
    (top / "cgroup.controllers").write_text("cpu pids\n")
    (top / "cgroup.subtree_control").write_text("pids\n")
    hierarchy = find(tmp_path)
    assert {*hierarchy.missing} == {"memory_mib"}
    assert "systemd-run --user --scope" in hierarchy.missing["memory_mib"]


def test_v2_that_is_not_ours_says_so(tree: Callable[..., Path], tmp_path: Path) -> None:
    tree("/user.slice/session-3.scope")
    (tmp_path / "cgroup").write_text("0::/elsewhere\n")
    hierarchy = find(tmp_path)
    assert hierarchy.version == 0
    assert "Delegate=yes" in hierarchy.missing["memory_mib"]


def test_v2_limits_and_counts(tree: Callable[..., Path], tmp_path: Path) -> None:
    top = tree("/", is_root=True)
    (top / "cgroup.subtree_control").write_text("memory pids\n")
    hierarchy = find(tmp_path)
    group = hierarchy.make(_LIMITS)
    folder = group.procs[0].parent
    for name, text in {
        "memory.max": "max",
        "memory.swap.max": "max",
        "pids.max": "max",
        "cgroup.procs": "",
        "cpu.stat": "usage_usec 1500000\nuser_usec 9",
        "memory.events": "low 0\nhigh 0\nmax 7\noom 2\noom_kill 1\noom_group_kill 0",
        "memory.peak": "123456",
        "pids.events": "max 5",
    }.items():
        (folder / name).write_text(text)
    group.limit(_LIMITS, spare_pids=2)
    written = {name: (folder / name).read_text() for name in ("memory.max", "memory.swap.max", "pids.max")}
    assert written == {"memory.max": str(64 << 20), "memory.swap.max": "0", "pids.max": "10"}
    assert (group.cpu_s(), group.oom_kills(), group.pids_hit(), group.peak_bytes()) == (1.5, 1, 5, 123456)
    group.begin()
    assert (group.cpu_s(), group.oom_kills(), group.pids_hit()) == (0.0, 0, 0)
    group.limit(Limits(memory_mib=None, pids=None))
    assert (folder / "memory.max").read_text() == (folder / "pids.max").read_text() == "max"
