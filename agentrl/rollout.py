"""Episodes: planned, run beside one another, tried again where the world fails, and grouped.

Every episode is its own asyncio task: no turn waits for another episode's tool. What is sampled depends on
the seeds in the plan alone; with ``deterministic`` also the shapes of the engine's batches do, because a
round of generation begins only when every episode in flight waits for one, and requests are handed over in
the plan's order. An episode whose tool hangs holds a round up until the tool's deadline, and no longer.

Calls may overlap, as where a later step's rollouts have begun already: all together have one bound of
episodes in flight, and a later call's begin where an earlier one's leave room.

A failure of the world (WorldError, a deadline) costs the environment: the episode starts anew in a fresh one,
with the same seeds, and after ``retries`` it is returned as invalid. Trajectories know all faults that they
met. Anything else that is raised is a bug: it leaves as it is, with a note of the environment and the task.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import groupby

from agentrl.attempts import Attempts, EngineSpeaker, EpisodePlan, GoldSpeaker, Speaker
from agentrl.chat import Chat
from agentrl.config import RolloutConfig
from agentrl.engine import Engine, Sampling
from agentrl.env import Env
from agentrl.errors import BadData, WorldError
from agentrl.faults import Ledger, as_fault
from agentrl.types import Group, Task, Trajectory
from agentrl.watchdog import Watchdog

__all__ = ["EpisodePlan", "Rollouts", "gold_episodes"]


class Rollouts:
    """Runs planned episodes of one environment against one engine."""

    def __init__(
        self,
        make_env: Callable[[], Env],
        *,
        chat: Callable[[Env], Chat],
        engine: Engine,
        limits: RolloutConfig,
        in_flight: int,  # episodes at once, of all calls together
        deterministic: bool = False,
        on_stall: Callable[[str], None] = lambda text: None,
    ) -> None:
        """``on_stall`` gets a line that says who waits for what, whenever nothing got on for
        ``limits.stall_s``."""
        self._engine, self._limits = engine, limits
        self._in_flight, self._deterministic = in_flight, deterministic
        self._places = asyncio.Semaphore(in_flight)  # first come, first served
        self._watchdog = Watchdog(quiet_s=limits.stall_s, on_stall=on_stall)
        self._attempts = Attempts(make_env, chat, limits=limits, watchdog=self._watchdog)

    async def groups(
        self,
        plans: Sequence[EpisodePlan],
        *,
        sampling: Sampling,
        on_begin: Callable[[], None] = lambda: None,
        on_episode: Callable[[], None] = lambda: None,
    ) -> list[Group]:
        """Run ``plans``; siblings of a task, which stand next to each other, become a group, in the plans'
        order.

        Of ``sampling``, max_tokens and seed are set for each turn, and the chat's stop tokens are added.
        ``on_begin`` is called when the first episodes have a place and begin, ``on_episode`` after each.
        """
        queue = deque(enumerate(plans))
        done: list[tuple[Task, Trajectory] | None] = [None] * len(plans)
        workers = min(self._in_flight, len(plans))
        rounds = _Rounds(workers if self._deterministic else 0)

        async def work() -> None:
            # A worker keeps its place until no plan is left: a later call's episode never comes before one of
            # this call's. Between two episodes it still counts as live, so the next one joins the next round.
            async with self._places:
                if len(queue) == len(plans):
                    on_begin()
                while queue:
                    at, plan = queue.popleft()
                    speaker = partial(self._speaker, plan, sampling, partial(rounds.turn, at))
                    done[at] = await self._episode(plan, speaker)
                    on_episode()
            rounds.leave()

        try:
            async with self._watchdog, asyncio.TaskGroup() as tasks:
                for _ in range(workers):
                    tasks.create_task(work())
        except (
            BaseExceptionGroup
        ) as failures:  # callers look for a UserError or their own bug, not for a group
            raise failures.exceptions[0] from None
        return _grouped(plans, [outcome for outcome in done if outcome is not None])

    async def _episode(
        self, plan: EpisodePlan, speaker: Callable[[Env, Chat], Speaker]
    ) -> tuple[Task, Trajectory]:
        """One episode, in a fresh environment for each attempt."""
        ledger = Ledger()
        with ledger.opened():
            for _ in range(1 + self._limits.retries):
                try:
                    task, trajectory = await self._attempts.run(plan, speaker)
                except WorldError as error:
                    ledger.faults.append(as_fault(error))
                else:
                    faults = (*ledger.faults, *trajectory.faults)
                    return task, replace(trajectory, faults=faults, calls=dict(ledger.calls))
        task = await self._attempts.task(plan)
        return task, _invalid(plan, task, ledger)

    def _speaker(
        self, plan: EpisodePlan, sampling: Sampling, turn: Callable[[], Awaitable[None]], _: Env, chat: Chat
    ) -> Speaker:
        """Who speaks in one attempt: the same seeds in each."""
        stops = tuple(sorted({*sampling.stop_token_ids, *chat.stop_token_ids}))
        return EngineSpeaker(
            self._engine,
            replace(sampling, stop_token_ids=stops),
            seed=plan.seed,
            deadline_s=self._limits.request_deadline_s,
            turn=turn,
        )


class _Rounds:
    """Holds requests back until every live episode has one, then lets them go in the plan's order.

    With ``live`` 0 nobody is ever held back.
    """

    def __init__(self, live: int) -> None:
        self._live, self._held_back = live, live > 0
        self._waiting: list[tuple[int, asyncio.Future[None]]] = []

    async def turn(self, place: int) -> None:
        """Wait for the round in which the episode at ``place`` of the plans may ask."""
        if not self._held_back:
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((place, future))
        self._begin_if_complete()
        await future

    def leave(self) -> None:
        """One live episode less."""
        self._live -= 1
        self._begin_if_complete()

    def _begin_if_complete(self) -> None:
        if self._waiting and len(self._waiting) == self._live:
            # Later, because who came last does not wait yet: its future done, it would go before the others.
            asyncio.get_running_loop().call_soon(self._begin)

    def _begin(self) -> None:
        for _, future in sorted(self._waiting, key=lambda entry: entry[0]):
            if not future.done():  # cancelled
                future.set_result(None)  # waiters wake in this order
        self._waiting.clear()


async def gold_episodes(
    make_env: Callable[[], Env],
    chat: Callable[[Env], Chat],
    plans: Iterable[EpisodePlan],
    *,
    limits: RolloutConfig,
) -> list[Trajectory]:
    """The episodes of ``plans`` as ``Env.gold`` says them: what a warm start learns from.

    Raises BadData for an episode that the environment does not reward: its gold messages are wrong; and the
    last WorldError of one that the world fails, or that is called invalid, in every attempt.
    """
    watchdog = Watchdog(quiet_s=limits.stall_s, on_stall=lambda text: None)
    attempts = Attempts(make_env, chat, limits=limits, watchdog=watchdog)
    episodes: list[Trajectory] = []
    for plan in plans:
        trajectory = await _gold_episode(attempts, plan, retries=limits.retries)
        if not trajectory.reward > 0:
            raise BadData(
                f"the gold episode of task {trajectory.task_id!r} ended with {trajectory.stop_reason!r} and "
                f"a reward of {trajectory.reward:g}; a right episode is rewarded: run agentrl check"
            )
        episodes.append(trajectory)
    return episodes


async def _gold_episode(attempts: Attempts, plan: EpisodePlan, *, retries: int) -> Trajectory:
    async def attempt() -> Trajectory:
        _, trajectory = await attempts.run(plan, GoldSpeaker)
        if not trajectory.valid:
            raise WorldError(f"task {trajectory.task_id!r}: {trajectory.faults[-1].message}")
        return trajectory

    for _ in range(retries):
        with suppress(WorldError):
            return await attempt()
    try:
        return await attempt()
    except WorldError as error:
        error.add_note(f"in every one of {1 + retries} attempts at the gold episode of task {plan.index}")
        raise


def _grouped(plans: Sequence[EpisodePlan], outcomes: Sequence[tuple[Task, Trajectory]]) -> list[Group]:
    pairs = zip(plans, outcomes, strict=True)
    groups: list[Group] = []
    # The seed parts two groups of the same task that happen to be neighbours.
    for _, siblings in groupby(pairs, key=lambda pair: (pair[0].split, pair[0].index, pair[0].env_seed)):
        members = [outcome for _, outcome in siblings]
        # An invalid episode may have nothing but a stand-in for its task.
        task = next((task for task, trajectory in members if trajectory.valid), members[0][0])
        groups.append(Group(task, tuple(trajectory for _, trajectory in members)))
    return groups


def _invalid(plan: EpisodePlan, task: Task, ledger: Ledger) -> Trajectory:
    """What is left of an episode that the world failed every time."""
    return Trajectory(
        task_id=task.id,
        sibling=plan.sibling,
        seed=plan.env_seed,
        turns=(),
        messages=task.prompt,
        stop_reason="fault",
        score=None,
        valid=False,
        fault=ledger.faults[-1].boundary,
        faults=tuple(ledger.faults),
        calls=dict(ledger.calls),
    )
