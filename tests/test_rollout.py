"""Episodes: token-exact, each waiting for nobody else, and three faults with three fates."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentrl.chats import Chats
from agentrl.config import RolloutConfig
from agentrl.engine import Engine, Sampling
from agentrl.env import Env, Step
from agentrl.errors import BadData, EngineError, UserError, WorldError
from agentrl.faults import in_line
from agentrl.rollout import EpisodePlan, Rollouts, gold_episodes
from agentrl.samples import to_samples
from agentrl.threads import in_thread
from agentrl.tool_env import ToolEnv
from agentrl.tools import tool
from agentrl.types import Completion, Group, Message, Task, Trajectory

CALL = '<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>'
BAD_CALLS = (
    '<tool_call>{"name": "add", "arguments": {"a": 1,</tool_call>',
    '<tool_call>{"name": "add", "arguments": {"a": "x", "b": 2}}</tool_call>',
    '<tool_call>{"name": "subtract", "arguments": {}}</tool_call>',
    '<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}',
    "<tool_call>[1, 2]</tool_call>",
)
TOO_LARGE = '<tool_call>{"name": "add", "arguments": {"a": 2000, "b": 2}}</tool_call>'
SAMPLING = Sampling(max_tokens=1, seed=0)


def plans(*, tasks: int = 1, siblings: int = 1) -> list[EpisodePlan]:
    return [
        EpisodePlan(split="train", index=index, sibling=sibling, env_seed=index, seed=100 * index + sibling)
        for index in range(tasks)
        for sibling in range(siblings)
    ]


def run(
    make_env: Callable[[], Env],
    engine: Engine,
    chats: Chats,
    *,
    planned: Sequence[EpisodePlan] | None = None,
    in_flight: int = 8,
    deterministic: bool = False,
    on_episode: Callable[[], None] = lambda: None,
    on_stall: Callable[[str], None] = lambda text: None,
    **limits: Any,
) -> list[Group]:
    limits = {"max_turn_tokens": 64, "max_episode_tokens": 512, "deadline_s": 5.0} | limits
    rollouts = Rollouts(
        make_env,
        chat=chats,
        engine=engine,
        limits=RolloutConfig(**limits),
        in_flight=in_flight,
        deterministic=deterministic,
        on_stall=on_stall,
    )
    planned = plans() if planned is None else planned
    groups = rollouts.groups(planned, sampling=SAMPLING, on_episode=on_episode)
    return asyncio.run(asyncio.wait_for(groups, timeout=30))


def only(groups: Sequence[Group]) -> Trajectory:
    (group,) = groups
    (trajectory,) = group.trajectories
    return trajectory


@pytest.fixture(scope="module")
def chats(tokenizer: Any) -> Chats:
    return Chats(tokenizer)


class Desk(ToolEnv):
    """One task again and again; subclasses misbehave."""

    made: list[Env]
    closed: list[Env]  # in threads, where += 1 would not do

    def __init__(self) -> None:
        self.made.append(self)
        super().__init__()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.made, cls.closed = [], []

    def tasks(self, split: str) -> Sequence[Task]:
        return [Task(id=f"{split}-{index}", prompt=(Message("user", "1 + 2?"),)) for index in range(4)]

    def reward(self, evidence: Any) -> float:
        return float(evidence.answer == "3")

    def close(self) -> None:
        self.closed.append(self)


# -- tokens --


def test_an_episode_is_what_was_asked_and_said(
    sums: type[Env], scripted_engine: Any, chats: Chats, tokenizer: Any
) -> None:
    engine = scripted_engine(CALL, "3")
    trajectory = only(run(sums, engine, chats))
    assert (trajectory.stop_reason, trajectory.reward, trajectory.valid) == ("answered", 1.0, True)
    assert [message.role for message in trajectory.messages] == ["user", "assistant", "tool", "assistant"]
    assert trajectory.messages[2].content == "3"
    assert trajectory.score is not None
    assert trajectory.score.value == 1.0
    text = tokenizer.decode(trajectory.prompt_ids(1))
    assert text.endswith("<tool_response>3</tool_response><|im_end|>\n<|im_start|>assistant\n")


def texts() -> st.SearchStrategy[str]:
    call = st.sampled_from([CALL, TOO_LARGE, *BAD_CALLS])
    answer = st.sampled_from(["3", "", "so <|im_start|> it is é"])
    return st.one_of(call, answer, st.tuples(call, call).map("".join), st.tuples(answer, call).map(" ".join))


def replies() -> st.SearchStrategy[Any]:
    return st.one_of(texts(), st.lists(st.integers(0, 299), min_size=1, max_size=40))


@settings(max_examples=150, deadline=None)
@given(
    said=st.lists(replies(), min_size=1, max_size=6),
    turn=st.integers(1, 80),
    room=st.integers(1, 300),
    first=texts(),
)
def test_samples_hold_the_ids_that_were_asked_and_said_and_train_on_those_said(
    sums: type[Env],
    scripted_engine: Any,
    chats: Chats,
    said: list[Any],
    turn: int,
    room: int,
    first: str,
) -> None:
    engine = scripted_engine(first, *said)
    env = sums()
    opening = len(chats(env).open(env.reset(seed=0, options={"split": "train", "index": 0})[0]))
    context = opening + max(room, turn)
    trajectory = only(run(sums, engine, chats, max_turn_tokens=turn, max_episode_tokens=context))

    assert trajectory.valid
    assert len(trajectory.turns) == len(engine.requests) == len(engine.completions)
    (sample,) = to_samples(trajectory)
    asked, last = engine.requests[-1][0], engine.completions[-1]
    assert sample.token_ids.tolist() == [*asked, *last.token_ids]
    expected, logprobs = np.zeros(len(sample.token_ids), bool), np.zeros(len(sample.token_ids), np.float32)
    for (prompt_ids, _), completion in zip(engine.requests, engine.completions, strict=True):
        start, stop = len(prompt_ids), len(prompt_ids) + len(completion.token_ids)
        assert sample.token_ids[:stop].tolist() == [*prompt_ids, *completion.token_ids]
        expected[start:stop], logprobs[start:stop] = True, completion.logprobs
    assert sample.mask.tolist() == expected.tolist()
    assert sample.logprobs.tolist() == logprobs.tolist()
    assert len(sample.token_ids) <= context
    assert max(len(completion.token_ids) for completion in engine.completions) <= turn


def test_every_turn_is_sampled_with_a_seed_of_its_own_and_the_same_when_run_again(
    sums: type[Env], scripted_engine: Any, chats: Chats
) -> None:
    seeds = []
    for in_flight in (1, 6):
        engine = scripted_engine(CALL, "3")
        run(sums, engine, chats, planned=plans(tasks=3, siblings=2), in_flight=in_flight)
        seeds.append(sorted(sampling.seed for _, sampling in engine.requests))
    assert seeds[0] == seeds[1]
    assert len(set(seeds[0])) == 12


def test_the_chats_stop_tokens_end_a_turn(sums: type[Env], scripted_engine: Any, chats: Chats) -> None:
    engine = scripted_engine("3")
    run(sums, engine, chats)
    assert engine.requests[0][1].stop_token_ids == chats(sums()).stop_token_ids


# -- where what is known to be quick is done --


class Scored:
    """A reward that notes its thread."""

    inline = True

    def __call__(self, evidence: Any) -> float:
        Threads.seen.append(f"score {threading.get_ident()}")
        return 1.0


class ScoredInThread(Scored):
    """Says nothing of itself."""


class Threads(ToolEnv):
    """Notes which thread resets it."""

    inline_reset = True
    seen: ClassVar[list[str]] = []
    reward = Scored()

    def tasks(self, split: str) -> Sequence[Task]:
        return [Task(id=split, prompt=(Message("user", "1 + 2?"),))]

    def setup(self, task: Task) -> None:
        self.seen.append(f"reset {threading.get_ident()}")


class Derived(Threads):
    """Says nothing of itself."""

    reward = ScoredInThread()


def test_what_is_inline_has_no_thread_and_what_derives_from_it_has_one(
    scripted_engine: Any, chats: Chats
) -> None:
    here = str(threading.get_ident())
    Threads.seen.clear()
    run(Threads, scripted_engine("3"), chats)
    assert Threads.seen == [f"reset {here}", f"score {here}"]
    Threads.seen.clear()
    run(Derived, scripted_engine("3"), chats)
    assert [said.partition(" ")[0] for said in Threads.seen] == ["reset", "score"]
    assert not any(said.endswith(here) for said in Threads.seen)


# -- budgets --


def test_a_turn_that_is_cut_off_ends_the_episode_and_its_calls_are_not_run(
    sums: type[Env], scripted_engine: Any, chats: Chats
) -> None:
    trajectory = only(run(sums, scripted_engine(CALL + " and so on" * 20), chats, max_turn_tokens=60))
    assert (trajectory.stop_reason, trajectory.reward) == ("length", 0.0)
    assert [message.role for message in trajectory.messages] == ["user", "assistant"]
    assert len(trajectory.messages[-1].tool_calls) == 1
    assert len(trajectory.turns[0].completion.token_ids) == 60


def test_an_episode_without_room_for_another_turn_is_scored_as_it_stands(
    scripted_engine: Any, chats: Chats
) -> None:
    class Wordy(Desk):
        @tool
        async def add(self, a: int, b: int) -> str:
            """Add."""
            return "3" * 400

        def reward(self, evidence: Any) -> float:
            return 0.25

    trajectory = only(run(Wordy, scripted_engine(CALL), chats, max_episode_tokens=200))
    assert (trajectory.stop_reason, trajectory.reward, len(trajectory.turns)) == ("context", 0.25, 1)


def test_a_turn_never_outgrows_the_context(sums: type[Env], scripted_engine: Any, chats: Chats) -> None:
    known = scripted_engine(CALL, "3")
    run(sums, known, chats)
    context = len(known.requests[1][0]) + 5
    limits = {"max_turn_tokens": 45, "max_episode_tokens": context}
    trajectory = only(run(sums, scripted_engine(CALL, "3" * 40), chats, **limits))
    assert [len(turn.completion.token_ids) for turn in trajectory.turns][1:] == [5]
    assert trajectory.stop_reason == "length"


def test_an_opening_that_leaves_no_room_is_the_users_error(
    sums: type[Env], scripted_engine: Any, chats: Chats
) -> None:
    with pytest.raises(UserError, match=r"the opening of task 'train-1' has .* the context is 10"):
        run(sums, scripted_engine("3"), chats, max_turn_tokens=10, max_episode_tokens=10)


# -- who waits for whom --


def test_a_slow_tool_does_not_delay_another_episodes_turn(scripted_engine: Any, chats: Chats) -> None:
    others = asyncio.Event()

    class Slow(Desk):
        @tool
        async def add(self, a: int, b: int) -> int:
            """Add."""
            if self.task.id == "train-0":
                await others.wait()
            return a + b

    left = iter(range(3))

    def on_episode() -> None:
        if next(left) == 1:  # both others are done
            others.set()

    groups = run(
        Slow, scripted_engine(CALL, "3"), chats, planned=plans(tasks=3), in_flight=3, on_episode=on_episode
    )
    assert [group.trajectories[0].reward for group in groups] == [1.0, 1.0, 1.0]


def test_a_step_that_blocks_its_thread_does_not_delay_another_episodes_turn(
    scripted_engine: Any, chats: Chats
) -> None:
    others = threading.Event()

    class Blocking(Env):
        def tasks(self, split: str) -> Sequence[Task]:
            return [Task(id=str(index), prompt=(Message("user", "1 + 2?"),)) for index in range(2)]

        def step(self, action: Message) -> Step:
            self.accept(action)
            if self.task.id == "0":
                assert others.wait(5)
            return self.transition(score=1.0, stop_reason="answered")

    groups = run(Blocking, scripted_engine("3"), chats, planned=plans(tasks=2), on_episode=others.set)
    assert [group.trajectories[0].reward for group in groups] == [1.0, 1.0]


@pytest.mark.parametrize("deterministic", [True, False])
def test_only_deterministic_batches_do_not_depend_on_how_long_tools_take(
    scripted_engine: Any, chats: Chats, deterministic: bool
) -> None:
    class Timed(Desk):
        slow: tuple[str, ...] = ()

        @tool
        async def add(self, a: int, b: int) -> int:
            """Add."""
            await asyncio.sleep(0.03 * (self.task.id in self.slow))
            return a + b

    def batches(*slow: str) -> list[list[list[int]]]:
        Timed.slow = slow
        # Prompts are alike, so an episode is told apart by what it says first; every third says no more.
        numbers = itertools.count(1)
        engine = scripted_engine(lambda _: f"{(n := next(numbers))} {CALL if n % 3 else n}", CALL, "3")
        run(
            Timed,
            engine,
            chats,
            planned=plans(tasks=4, siblings=2),
            in_flight=4,
            deterministic=deterministic,
        )
        return [[ids.tolist() for ids in batch] for batch in engine.batches]

    latencies = [(), ("train-0",), ("train-1", "train-2"), ("train-3",)]
    first, *others = (batches(*slow) for slow in latencies)
    assert all(other == first for other in others) == deterministic


def test_siblings_see_the_same_start(scripted_engine: Any, chats: Chats) -> None:
    class Drawn(Desk):
        def opening(self, task: Task) -> tuple[Message, ...]:
            return (Message("user", f"{self.np_random.integers(1 << 30)} + 2?"),)

    groups = run(Drawn, scripted_engine("3"), chats, planned=plans(tasks=2, siblings=3))
    starts = [{trajectory.messages[0].content for trajectory in group.trajectories} for group in groups]
    assert [len(start) for start in starts] == [1, 1]
    assert starts[0] != starts[1]


def test_overlapping_calls_share_one_bound_and_an_earlier_calls_episodes_begin_first(
    scripted_engine: Any, chats: Chats
) -> None:
    class Counted(Desk):
        open_at_once: ClassVar[list[int]] = []

        def __init__(self) -> None:
            super().__init__()
            self.open_at_once.append(len(self.made) - len(self.closed))

    rollouts = Rollouts(
        Counted,
        chat=chats,
        engine=scripted_engine("3"),
        limits=RolloutConfig(max_turn_tokens=64, max_episode_tokens=512),
        in_flight=3,
    )
    made_before: list[int] = []

    async def overlapping() -> list[list[Group]]:
        calls = [
            rollouts.groups(
                plans(tasks=4, siblings=2),
                sampling=SAMPLING,
                on_begin=lambda: made_before.append(len(Counted.made)),
            )
            for _ in range(3)
        ]
        return await asyncio.wait_for(asyncio.gather(*calls), 30)

    outcomes = asyncio.run(overlapping())
    assert [len(group.valid) for groups in outcomes for group in groups] == [2] * 12
    assert max(Counted.open_at_once) == 3
    assert made_before == [0, 8, 16]


def test_groups_come_in_the_plans_order_and_neighbours_of_one_task_stay_two(
    sums: type[Env], scripted_engine: Any, chats: Chats
) -> None:
    planned = [
        EpisodePlan(split="train", index=index, sibling=sibling, env_seed=place, seed=0)
        for place, index in enumerate([2, 1, 1])
        for sibling in range(2)
    ]
    groups = run(sums, scripted_engine("3"), chats, planned=planned, in_flight=3, deterministic=True)
    assert [group.task.id for group in groups] == ["train-3", "train-2", "train-2"]
    assert [len(group.trajectories) for group in groups] == [2, 2, 2]
    assert [[t.sibling for t in group.trajectories] for group in groups] == [[0, 1]] * 3


# -- the world's faults --


def test_after_a_failure_of_the_world_the_episode_begins_anew_in_a_fresh_environment(
    scripted_engine: Any, chats: Chats
) -> None:
    class Shaky(Desk):
        @tool
        async def add(self, a: int, b: int) -> int:
            """Add."""
            if len(self.made) < 3:
                raise WorldError("the sandbox is gone")
            return a + b

    trajectory = only(run(Shaky, scripted_engine(CALL, "3"), chats, retries=2))
    assert (trajectory.valid, trajectory.reward, len(Shaky.made)) == (True, 1.0, 3)
    assert Shaky.made == Shaky.closed
    assert len(trajectory.turns) == 2


def test_an_episode_that_the_world_fails_every_time_is_invalid_and_its_siblings_are_not(
    scripted_engine: Any, chats: Chats
) -> None:
    class Broken(Desk):
        def setup(self, task: Task) -> None:
            if task.id == "train-1":
                raise WorldError("no such image")

    groups = run(Broken, scripted_engine("3"), chats, planned=plans(tasks=2, siblings=2), retries=1)
    assert [len(group.valid) for group in groups] == [2, 0]
    failed = groups[1].trajectories[0]
    assert (failed.task_id, failed.stop_reason, failed.fault) == ("train-1", "fault", "environment")
    assert (failed.score, failed.turns) == (None, ())
    assert [fault.message for fault in failed.faults] == ["no such image"] * 2
    assert len(Broken.made) == len(Broken.closed)


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_failure_of_the_engine_is_retried_and_then_counted_as_its_own(
    sums: type[Env], scripted_engine: Any, chats: Chats, deterministic: bool
) -> None:
    engine = scripted_engine(CALL, EngineError("out of memory"))
    trajectory = only(run(sums, engine, chats, retries=2, deterministic=deterministic))
    assert (trajectory.valid, trajectory.fault) == (False, "engine")
    assert len(engine.requests) == 6

    class Aborting(type(engine)):  # type: ignore[misc]
        async def generate(self, prompt_ids: Any, sampling: Sampling) -> Completion:
            return Completion([1], [0.0], [0], "aborted")

    assert only(run(sums, Aborting(None), chats)).fault == "engine"


def test_an_environment_that_outlasts_its_deadline_fails_like_the_world(
    scripted_engine: Any, chats: Chats
) -> None:
    class Hanging(Desk):
        async def astep(self, action: Message) -> Step:
            await asyncio.sleep(60)
            raise AssertionError

    trajectory = only(run(Hanging, scripted_engine("3"), chats, deadline_s=0.05, retries=1))
    assert (trajectory.valid, trajectory.fault, len(trajectory.faults)) == (False, "environment", 2)


def test_a_hanging_reset_or_close_holds_nobody_up(scripted_engine: Any, chats: Chats) -> None:
    over = threading.Event()

    class Stuck(Desk):
        def setup(self, task: Task) -> None:
            if len(self.made) == 1:
                over.wait(60)

        def close(self) -> None:
            over.wait(60)

    trajectory = only(run(Stuck, scripted_engine("3"), chats, deadline_s=0.3, retries=9))
    over.set()
    assert (trajectory.valid, trajectory.reward) == (True, 1.0)
    assert len(Stuck.made) > 1


class Failing(Desk):
    """Fails at the boundary that is asked for."""

    boundary = ""

    @tool
    async def add(self, a: int, b: int) -> int:
        """Add."""
        self.fail("tool")
        return a + b

    def setup(self, task: Task) -> None:
        self.fail("environment")

    def reward(self, evidence: Any) -> float:
        self.fail("reward")
        return 1.0

    def fail(self, boundary: str) -> None:
        if boundary == self.boundary:
            raise WorldError(f"the {boundary} is gone")


@pytest.mark.parametrize("boundary", ["tool", "environment", "reward"])
def test_an_invalid_episode_names_the_boundary_that_failed(
    scripted_engine: Any, chats: Chats, monkeypatch: pytest.MonkeyPatch, boundary: str
) -> None:
    monkeypatch.setattr(Failing, "boundary", boundary)
    trajectory = only(run(Failing, scripted_engine(CALL, "3"), chats, retries=1))
    assert (trajectory.valid, trajectory.fault) == (False, boundary)
    assert [fault.message for fault in trajectory.faults] == [f"the {boundary} is gone"] * 2


def test_a_healed_episode_knows_its_faults(scripted_engine: Any, chats: Chats) -> None:
    engine = scripted_engine(CALL, "3")
    said = engine.generate

    async def once(prompt_ids: Any, sampling: Sampling) -> Completion:
        engine.generate = said
        raise EngineError("out of memory")

    engine.generate = once
    assert only(run(Failing, scripted_engine("3"), chats)).faults == ()
    healed = only(run(Failing, engine, chats))
    assert (healed.valid, healed.fault, len(healed.faults)) == (True, "", 1)
    assert healed.faults[0].boundary == "engine"


def test_an_environment_that_can_not_be_made_fails_like_the_world(scripted_engine: Any, chats: Chats) -> None:
    def make() -> Env:
        raise WorldError("no image")

    trajectory = only(run(make, scripted_engine("3"), chats, retries=1))
    assert (trajectory.valid, trajectory.fault, trajectory.task_id) == (False, "environment", "train[0]")


def test_an_engine_that_does_not_answer_is_given_up(
    sums: type[Env], scripted_engine: Any, chats: Chats
) -> None:
    engine = scripted_engine("3")
    engine.generate = lambda prompt_ids, sampling: asyncio.sleep(60)
    trajectory = only(run(sums, engine, chats, request_deadline_s=0.05, retries=0))
    assert (trajectory.valid, trajectory.fault) == (False, "engine")
    assert "rollout.request_deadline_s" in trajectory.faults[0].message


def test_a_reward_that_hangs_is_named(scripted_engine: Any, chats: Chats) -> None:
    over = threading.Event()

    class Slow(Desk):
        def reward(self, evidence: Any) -> float:
            over.wait(60)
            return 1.0

    # Long enough for the reset, which has the same deadline, on a machine with other work.
    trajectory = only(run(Slow, scripted_engine("3"), chats, deadline_s=1.0, retries=0))
    over.set()
    assert (trajectory.valid, trajectory.fault) == (False, "reward")


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_tool_that_hangs_is_an_observation_even_where_a_step_may_take_less_than_a_tool(
    scripted_engine: Any, chats: Chats, deterministic: bool
) -> None:
    over = threading.Event()

    class Hanging(Desk):
        tool_deadline_s = 3.0

        @tool
        async def add(self, a: int, b: int) -> int:
            """Add."""
            if self.task.id == "train-0":
                await in_thread(over.wait, 60)
            return a + b

    groups = run(
        Hanging,
        scripted_engine(CALL, "3"),
        chats,
        planned=plans(tasks=3),
        deadline_s=2.5,  # by which a step may outlast its tools, on a machine with other work
        deterministic=deterministic,
    )
    over.set()
    assert [only([group]).reward for group in groups] == [1.0, 1.0, 1.0]
    hung = only(groups[:1])
    assert "took longer than 3 s" in hung.messages[2].content
    assert (hung.faults, hung.calls) == ((), {"late": 1})


@pytest.mark.parametrize("waits_for_others", [True, False])
def test_a_step_that_stands_in_line_behind_others_is_not_late(
    scripted_engine: Any, chats: Chats, waits_for_others: bool
) -> None:
    class Crowded(Desk):
        def reward(self, evidence: Any) -> float:
            with in_line() if waits_for_others else nullcontext():
                time.sleep(1.5)
            return 1.0

    trajectory = only(run(Crowded, scripted_engine("3"), chats, deadline_s=1.0, retries=0))
    assert (trajectory.valid, trajectory.fault) == ((True, "") if waits_for_others else (False, "reward"))


def test_a_coroutine_that_refuses_to_be_cancelled_holds_nobody_up(scripted_engine: Any, chats: Chats) -> None:
    over = asyncio.Event()

    class Stubborn(Desk):
        async def astep(self, action: Message) -> Step:
            while not over.is_set():
                with suppress(asyncio.CancelledError):
                    await over.wait()
            raise WorldError("at last")

    groups = run(Stubborn, scripted_engine("3"), chats, deadline_s=0.1, retries=0, on_episode=over.set)
    assert only(groups).fault == "environment"


def test_a_stalled_step_names_task_and_boundary(scripted_engine: Any, chats: Chats) -> None:
    over = threading.Event()
    said: list[str] = []

    class Slow(Desk):
        def reward(self, evidence: Any) -> float:
            over.wait(60)
            return 1.0

    def on_stall(text: str) -> None:
        if "task 'train-0', sibling 0, on the reward in its step" in text:  # others where a reset takes long
            said.append(text)
            over.set()

    deadlines = {"stall_s": 0.05, "deadline_s": 20.0}
    assert only(run(Slow, scripted_engine("3"), chats, on_stall=on_stall, **deadlines)).reward == 1.0
    assert said


def test_a_stream_of_tasks_that_is_used_up_begins_again(scripted_engine: Any, chats: Chats) -> None:
    class Finite(Desk):
        def tasks(self, split: str) -> Iterator[Task]:  # type: ignore[override]
            return iter(super().tasks(split))

    groups = run(Finite, scripted_engine("3"), chats, planned=plans(tasks=6))
    assert [group.task.id for group in groups] == [f"train-{index % 4}" for index in range(6)]


def test_a_stream_of_tasks_that_broke_is_read_anew_in_the_next_attempt(
    scripted_engine: Any, chats: Chats
) -> None:
    class Torn(Desk):
        breaks: ClassVar[list[str]] = ["once"]

        def tasks(self, split: str) -> Iterator[Task]:  # type: ignore[override]
            yield from list(super().tasks(split))[:1]
            if self.breaks:
                raise WorldError(self.breaks.pop())
            yield from list(super().tasks(split))[1:]

    groups = run(Torn, scripted_engine("3"), chats, planned=plans(tasks=3), in_flight=1)
    assert [group.task.id for group in groups] == ["train-0", "train-1", "train-2"]
    assert [fault.message for fault in only(groups[1:2]).faults] == ["once"]


def test_a_world_that_is_gone_at_the_close_does_not_spoil_the_episode(
    scripted_engine: Any, chats: Chats
) -> None:
    class Gone(Desk):
        def close(self) -> None:
            raise WorldError("the engine of the sandbox does not answer")

    assert only(run(Gone, scripted_engine("3"), chats)).reward == 1.0


# -- our faults --


@pytest.mark.parametrize("bug", [KeyError("price"), TimeoutError("of somebody's socket")])
def test_a_bug_in_an_environment_crashes_with_the_names_of_environment_and_task(
    scripted_engine: Any, chats: Chats, bug: Exception
) -> None:
    class Buggy(Desk):
        @tool
        async def add(self, a: int, b: int) -> int:
            """Add."""
            raise bug

    with pytest.raises(type(bug)) as caught:
        run(Buggy, scripted_engine(CALL), chats, planned=plans(tasks=1, siblings=3))
    notes = "\n".join(caught.value.__notes__)
    assert "Buggy" in notes
    assert "'train-0'" in notes
    assert set(Buggy.made) == set(Buggy.closed)


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_tool_that_cancels_itself_is_a_bug_and_keeps_nobody_waiting(
    scripted_engine: Any, chats: Chats, deterministic: bool
) -> None:
    class Leaky(Desk):
        @tool
        async def add(self, a: int, b: int) -> int:
            """Add two numbers."""
            if self.task.id == "train-0":
                raise asyncio.CancelledError
            return a + b

    engine = scripted_engine(CALL, "3")
    with pytest.raises(RuntimeError, match="nobody had asked for") as caught:
        run(Leaky, engine, chats, planned=plans(tasks=3), deterministic=deterministic)
    assert any("Leaky" in note for note in caught.value.__notes__)


def test_a_bug_outside_tools_is_named_too(scripted_engine: Any, chats: Chats) -> None:
    class Plain(Env):
        def tasks(self, split: str) -> Sequence[Task]:
            return [Task(id=str(index), prompt=(Message("user", "1 + 2?"),)) for index in range(2)]

        def step(self, action: Message) -> Step:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        run(Plain, scripted_engine("3"), chats, planned=plans(tasks=2)[1:])
    assert any("task 1 of the split 'train'" in note and "Plain" in note for note in caught.value.__notes__)


# -- gold --


def test_gold_episodes_are_token_for_token_what_the_template_writes(
    sums: type[Env], chats: Chats, tokenizer: Any
) -> None:
    limits = RolloutConfig(max_turn_tokens=64, max_episode_tokens=512)
    episodes = asyncio.run(gold_episodes(sums, chats, plans(tasks=3), limits=limits))
    for episode in episodes:
        (sample,) = to_samples(episode)
        rendered = chats(sums()).encode_conversation(episode.messages, generate=False).tolist()
        assert rendered[: len(sample.token_ids)] == sample.token_ids.tolist()
        assert tokenizer.decode(rendered[len(sample.token_ids) :]) == "\n"
        trained = tokenizer.decode(sample.token_ids[sample.mask])
        assert trained.count("<|im_end|>") == 2
        assert trained.startswith("<tool_call>")
        assert episode.reward == 1.0


def test_a_failure_of_the_world_in_a_gold_episode_is_retried(chats: Chats) -> None:
    class Shaky(Failing):
        def gold(self, task: Task) -> Sequence[Message]:
            if len(self.made) < 3:
                raise WorldError("the page with the answers is gone")
            return (Message("assistant", "3"),)

    limits = RolloutConfig(max_turn_tokens=64, max_episode_tokens=512, retries=2)
    (episode,) = asyncio.run(gold_episodes(Shaky, chats, plans(), limits=limits))
    assert episode.reward == 1.0
    Shaky.made.clear()
    limits = limits.model_copy(update={"retries": 1})
    with pytest.raises(WorldError, match="the page with the answers") as caught:
        asyncio.run(gold_episodes(Shaky, chats, plans(), limits=limits))
    assert "every one of 2 attempts" in caught.value.__notes__[-1]


def test_a_gold_episode_that_its_environment_calls_invalid_is_the_worlds_fault(chats: Chats) -> None:
    class Unsure(Desk):
        async def astep(self, action: Any) -> Any:
            observation, reward, terminated, truncated, info = await super().astep(action)
            first = len(self.made) == 1
            return observation, reward, terminated, truncated, {**info, "is_valid": not first}

        def gold(self, task: Task) -> Sequence[Message]:
            return (Message("assistant", "3"),)

    limits = RolloutConfig(max_turn_tokens=64, max_episode_tokens=512, retries=1)
    (episode,) = asyncio.run(gold_episodes(Unsure, chats, plans(), limits=limits))
    assert (episode.valid, len(Unsure.made)) == (True, 2)
    Unsure.made.clear()
    limits = limits.model_copy(update={"retries": 0})
    with pytest.raises(WorldError, match="the environment called its episode invalid"):
        asyncio.run(gold_episodes(Unsure, chats, plans(), limits=limits))


@pytest.mark.parametrize(
    ("gold", "message"),
    [
        ((Message("assistant", "4"),), "ended with 'answered' and a reward of 0"),
        ((), "goes on after its last gold message"),
    ],
)
def test_a_wrong_gold_is_an_error(chats: Chats, gold: tuple[Message, ...], message: str) -> None:
    class Wrong(Desk):
        def gold(self, task: Task) -> Sequence[Message]:
            return gold

    limits = RolloutConfig(max_turn_tokens=64, max_episode_tokens=512)
    with pytest.raises(BadData, match=message):
        asyncio.run(gold_episodes(Wrong, chats, plans(), limits=limits))
    assert len(Wrong.made) == len(Wrong.closed) == 1
