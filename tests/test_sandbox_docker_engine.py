"""The docker backend and its engine: pools, owners that die, engines that go away, what is left."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from containers import IMAGE, LIMITS, Gate, changed, containers, docker, docker_backend, run_python, until

from agentrl.chats import Chats
from agentrl.config import RolloutConfig
from agentrl.engine import Sampling
from agentrl.errors import BadConfig, MissingExtra
from agentrl.registry import make, register
from agentrl.rollout import EpisodePlan, Rollouts
from agentrl.sandbox import Backend, SandboxLost
from agentrl.sandboxing import container_meter
from agentrl.sandboxing.container_engine import Shape
from agentrl.sandboxing.container_pool import Crew, Pool
from agentrl.types import Group, Trajectory

# The SDK leaves the socket of a connection that is refused or breaks to the garbage collector.
pytestmark = [pytest.mark.docker, pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")]

_EPISODES = 8
Roll = Callable[[Callable[[], None]], list[Trajectory]]  # told after each episode


def test_a_container_that_is_killed_from_outside_is_the_worlds() -> None:
    with closing(docker_backend()) as backend:
        sandbox = backend.open(LIMITS)
        killer = threading.Timer(0.5, lambda: docker("kill", *containers()))
        killer.start()
        result = sandbox.run(["sleep", "60"])
        killer.join()
        assert (result.status, result.fault) == ("lost", "world")
        with pytest.raises(SandboxLost, match="was lost"):
            sandbox.run(["true"])


@pytest.fixture(autouse=True)
def _collected() -> Iterator[None]:
    yield
    gc.collect()


# -- an engine that goes away --


def _running() -> list[str]:
    """Without what was made while nobody could be told of it: that is for the sweep."""
    return docker("ps", "-q", "--filter", f"name=agentrl-{os.getpid()}-").split()


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    with closing(Gate(tmp_path)) as made:
        yield made
    for unseen in containers():
        with suppress(subprocess.CalledProcessError):  # on its way out by itself
            docker("rm", "-f", unseen)


def test_an_engine_that_is_stopped_during_a_run_is_the_worlds_fault(gate: Gate) -> None:
    backend = docker_backend(base_url=f"unix://{gate.path}", pool=1, patience_s=20, outage_s=1)
    sandbox, idle = backend.open(LIMITS), backend.open(LIMITS)
    assert sandbox.run(["true"]).status == "ok"
    stop = threading.Timer(0.5, gate.cut)
    stop.start()
    result = sandbox.run(["sleep", "60"])
    stop.join()
    assert (result.status, result.fault) == ("lost", "world")
    for use in (
        lambda: sandbox.run(["true"]),
        lambda: idle.run(["true"]),
        lambda: idle.read("file"),
        lambda: backend.open(LIMITS),
    ):
        with pytest.raises(SandboxLost):
            use()
    backend.close()
    assert until(lambda: not _running()), "hung up on, a container ends and is removed"


@pytest.mark.slow
def test_an_engine_that_hangs_is_the_worlds_fault_after_a_while(gate: Gate) -> None:
    backend = docker_backend(base_url=f"unix://{gate.path}", patience_s=12, outage_s=1)
    sandbox = backend.open(LIMITS)
    freeze = threading.Timer(0.3, gate.freeze)
    freeze.start()
    begun = time.monotonic()
    result = sandbox.run(["sleep", "60"], limits=changed(wall_s=1))
    freeze.join()
    assert (result.status, result.fault) == ("lost", "world")
    assert time.monotonic() - begun < 60
    with pytest.raises(SandboxLost):
        backend.open(LIMITS)
    gate.cut()
    backend.close()
    assert until(lambda: not _running())


def test_a_session_waits_for_an_engine_that_comes_back(gate: Gate) -> None:
    returned = threading.Event()
    backend = docker_backend(base_url=f"unix://{gate.path}", pool=1, patience_s=20, outage_s=30)
    backend.open(LIMITS).close()
    assert until(lambda: len(containers()) >= 1)  # the one kept ready
    gate.cut()
    for act in (returned.set, gate.reopen):
        threading.Timer(2, act).start()
    assert backend.open(LIMITS).run(["echo", "back"]).stdout == b"back\n"
    assert returned.is_set()
    backend.close()
    gate.cut()
    assert until(lambda: not _running())


def test_closing_ends_the_wait_for_an_engine(gate: Gate) -> None:
    backend = docker_backend(base_url=f"unix://{gate.path}", patience_s=20, outage_s=300)
    backend.open(LIMITS).close()
    gate.cut()
    close = threading.Timer(1, backend.close)
    close.start()
    with pytest.raises(SandboxLost):
        backend.open(LIMITS)
    close.join()


# -- episodes of code while the engine goes away: tried again or left out, never scored 0 --


@pytest.fixture
def roll(tokenizer: Any, scripted_engine: Any, gate: Gate, request: pytest.FixtureRequest) -> Iterator[Roll]:
    """Right answers to a task of ``code``, two at a time, judged in containers behind the gate."""
    backend: Backend = docker_backend(base_url=f"unix://{gate.path}", patience_s=20, outage_s=request.param)
    name = f"gated-{gate.path.parent.name}"
    register(name, lambda: backend, "sandbox")
    env = make("code", sandbox=name)
    (answer,) = env.gold(env.tasks("train")[0])
    planned = [
        EpisodePlan(split="train", index=0, sibling=sibling, env_seed=0, seed=sibling)
        for sibling in range(_EPISODES)
    ]

    def play(on_episode: Callable[[], None]) -> list[Trajectory]:
        rollouts = Rollouts(
            lambda: make("code", sandbox=name),
            chat=Chats(tokenizer),
            engine=scripted_engine(answer.content),
            limits=RolloutConfig(max_turn_tokens=2048, max_episode_tokens=8192, retries=1),
            in_flight=2,
        )
        sampling = Sampling(max_tokens=2048, seed=0)
        groups: list[Group] = asyncio.run(rollouts.groups(planned, sampling=sampling, on_episode=on_episode))
        return [trajectory for group in groups for trajectory in group.trajectories]

    yield play
    backend.close()


@pytest.mark.parametrize("roll", [30.0], indirect=True)
def test_episodes_wait_for_an_engine_that_is_restarted(roll: Roll, gate: Gate) -> None:
    done: list[None] = []

    def stop_after_two() -> None:
        done.append(None)
        if len(done) == 2:
            gate.cut()
            threading.Timer(3, gate.reopen).start()

    episodes = roll(stop_after_two)
    assert [(episode.valid, episode.reward) for episode in episodes] == [(True, 1.0)] * _EPISODES


@pytest.mark.parametrize("roll", [0.5], indirect=True)
def test_episodes_that_no_engine_judges_are_left_out_with_the_reason(roll: Roll, gate: Gate) -> None:
    done: list[None] = []

    def stop_after_two() -> None:
        done.append(None)
        if len(done) == 2:
            gate.cut()

    episodes = roll(stop_after_two)
    judged = [episode for episode in episodes if episode.valid]
    assert 2 <= len(judged) < _EPISODES
    assert {episode.reward for episode in judged} == {1.0}
    lost = [episode for episode in episodes if not episode.valid]
    assert all(episode.score is None for episode in lost)
    assert {fault.boundary for episode in lost for fault in episode.faults} == {"sandbox"}
    assert all("Docker engine" in fault.message for episode in lost for fault in episode.faults)


# -- an engine that is not as it should be --


def test_no_engine_is_said_so(tmp_path: Path) -> None:
    with closing(docker_backend(base_url=f"unix://{tmp_path}/none", patience_s=2)) as backend:
        assert not backend.survey().available
        with pytest.raises(BadConfig, match="not available here: the Docker engine could not .* docker info"):
            backend.open(LIMITS)


def test_a_missing_sdk_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "docker", None)
    with pytest.raises(MissingExtra, match=r'pip install "agentrl-gym\[docker\]"'):
        docker_backend()


def test_what_the_engine_lacks_is_named() -> None:
    with (
        closing(docker_backend(image="no-such-image:1")) as backend,
        pytest.raises(BadConfig, match="docker pull no-such-image:1, or name another"),
    ):
        backend.open(LIMITS)
    with (
        closing(docker_backend(runtime="no-such-runtime")) as backend,
        pytest.raises(BadConfig, match="no runtime 'no-such-runtime', only .*gvisor"),
    ):
        backend.open(LIMITS)


def test_where_no_cgroup_can_be_read_the_engine_is_asked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(container_meter, "_CGROUPS", tmp_path)
    with closing(docker_backend()) as backend:
        sandbox = backend.open(LIMITS)
        assert run_python(sandbox, "x = bytearray(300 << 20)").status == "memory"
        result = run_python(sandbox, "while True: pass", cpu_s=1)
        assert (result.status, result.fault) == ("cpu", "policy")
        assert 800 < result.cpu_ms < 8000
        assert run_python(sandbox, "print()", cpu_s=1).status == "ok"


# -- many, and what is left --


def test_the_pool_hands_out_each_container_once() -> None:
    with closing(docker_backend(pool=2)) as pooled:
        pooled.open(LIMITS).close()
        assert until(lambda: len(containers()) >= 2)
        names = set()
        for _ in range(4):
            sandbox = pooled.open(LIMITS)
            sandbox.write("mark", b"")
            assert sandbox.run(["sh", "-c", "ls"]).stdout == b"mark\n"
            names.add(
                sandbox.run(["sh", "-c", "cat /proc/self/mountinfo | grep ' /work ' | cut -d' ' -f3"]).stdout
            )
            sandbox.close()
        other = pooled.open(changed(memory_mib=64))
        assert other.run(["python3", "-c", "x = bytearray(100 << 20)"]).status == "memory"


def test_a_job_that_raises_holds_up_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: told.append(args.exc_type))
    crew, done = Crew(at_once=1), threading.Event()
    for job in (lambda: 1 / 0, done.set):
        crew.do(job)
    begun = time.monotonic()
    assert done.wait(20)
    crew.join(begun + 20)
    crew.do(done.clear)
    crew.join(begun + 20)
    assert not done.is_set()
    assert time.monotonic() - begun < 10
    assert told == [ZeroDivisionError]


def test_a_container_whose_making_raises_is_made_later_and_holds_up_no_close(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: told.append(args.exc_type))

    class Faulty:
        def create(self, shape: Shape) -> Any:
            made.append(shape)
            if len(made) == 2:  # the one to be kept ready
                raise ZeroDivisionError
            link = SimpleNamespace(is_fresh=lambda: True, close=lambda: None)
            return SimpleNamespace(id=str(len(made)), link=link)

        def remove(self, name: str) -> None:
            pass

    made: list[Shape] = []
    engine: Any = Faulty()
    crew = Crew(at_once=2)
    pool, shape = Pool(engine, crew, size=1), Shape.of(LIMITS)
    begun = time.monotonic()
    pool.take(shape)
    crew.join(begun + 20)
    assert (len(made), told) == (2, [ZeroDivisionError])
    pool.take(shape)
    crew.join(begun + 20)
    assert len(made) == 4
    pool.close()
    crew.join(begun + 20)
    assert time.monotonic() - begun < 10


def test_closing_from_another_thread_ends_a_run_and_a_creation() -> None:
    own = docker_backend(pool=1)
    sandbox = own.open(LIMITS)
    ends: list[Any] = []

    def run() -> None:
        ends.append(sandbox.run(["sleep", "60"]).status)

    def create() -> None:
        try:
            own.open(changed(memory_mib=64))
        except SandboxLost as error:
            ends.append(str(error))

    threads = [threading.Thread(target=work) for work in (run, create, create)]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    before = set(containers())
    own.close()
    for thread in threads:
        thread.join()
    assert sorted(ends) == ["lost", *["this docker backend is closed: make another"] * 2]
    assert before
    assert until(lambda: not containers())


_OWNER = f"""
import sys, time
from agentrl.registry import make_sandbox
from agentrl.sandbox import Limits
backend = make_sandbox("docker", image={IMAGE!r}, pool=int(sys.argv[1]))
sandbox = backend.open(Limits())
def talk(channel):
    print(channel.receive(10).decode(), flush=True)
    time.sleep(600)
sandbox.run(["sh", "-c", "setsid sleep 300 & echo runs; sleep 300"], stdin=talk)
"""


def _killed_owner(pool: int) -> int:
    """The number of a process that was killed during a run, with so many containers in the making."""
    owner = subprocess.Popen(
        [sys.executable, "-c", _OWNER, str(pool)], stdout=subprocess.PIPE, cwd=Path(__file__).parent.parent
    )
    assert owner.stdout is not None
    assert owner.stdout.readline() == b"runs\n"
    assert containers(owner.pid)
    owner.kill()
    owner.wait()
    owner.stdout.close()
    return owner.pid


def test_what_runs_dies_with_an_owner_that_is_killed() -> None:
    owner = _killed_owner(pool=0)
    assert until(lambda: not containers(owner))


def test_the_next_sweep_removes_what_a_killed_owner_had_in_the_making() -> None:
    owner = _killed_owner(pool=4)
    with closing(docker_backend()) as backend:
        # What the engine was asked for, it makes; also when who asked is gone.
        assert until(lambda: backend.sweep() == 0 and not containers(owner))
        time.sleep(3)
        backend.sweep()
        assert not containers(owner)


def test_a_sweep_removes_what_dead_owners_left_and_nothing_else() -> None:
    backend = docker_backend()
    sandbox = backend.open(LIMITS)
    mine = docker(
        "inspect", "--format", '{{index .Config.Labels "agentrl.sandbox.owner"}}', containers()[0]
    ).strip()
    where, pid, started = mine.rsplit("-", 2)
    owners = {
        "dead": f"{where}-{pid}-{int(started) - 1}",
        "mine": mine,
        "elsewhere": f"another-machine:1-{pid}-{int(started) - 1}",
    }

    def create(name: str) -> None:
        label = f"agentrl.sandbox.owner={owners[name]}"
        docker("create", "--name", f"sweep-{os.getpid()}-{name}", "--label", label, IMAGE, "true")

    create("mine")
    create("elsewhere")
    try:
        for _ in range(5):  # tests in other processes sweep, too, and may be first
            create("dead")
            if backend.sweep():
                break
        else:
            pytest.fail("it swept nothing")
        left = docker("ps", "-a", "--format", "{{.Names}}", "--filter", f"name=sweep-{os.getpid()}-").split()
        assert sorted(left) == [f"sweep-{os.getpid()}-elsewhere", f"sweep-{os.getpid()}-mine"]
        assert sandbox.run(["true"]).status == "ok"
    finally:
        docker("rm", "-f", *(f"sweep-{os.getpid()}-{name}" for name in owners if name != "dead"))
        backend.close()


def test_a_closed_backend_has_left_nothing() -> None:
    own = docker_backend(pool=2)
    descriptors = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        own.open(LIMITS).run(["sh", "-c", "sleep 100 &"])
    own.close()
    own.close()
    assert not containers()
    assert len(os.listdir("/proc/self/fd")) <= descriptors + 2
    with pytest.raises(SandboxLost, match="closed"):
        own.open(LIMITS)
