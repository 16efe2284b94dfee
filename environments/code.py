"""Programming problems with tests: the answer is a program, and the verdict is reached outside of it.

One turn, or several: then the first public test that fails is shown (input, expected, got), until the public
tests pass or the turns are used up, and hidden tests judge what was said last. Public tests run by
themselves, so that nothing hidden is near them: neither a value nor, unless ``feedback="verdict"``, that a
hidden one failed.

``dataset``: "basics", the bundled suite, which needs nothing else; "humaneval", "mbpp", "humanevalplus" and
"mbppplus" from the hub; any of these as a file, or rows of one's own, whose columns ``columns`` names. Of the
bundled suite a fixed share, by a hash of its text, is the test split; a file of MBPP, all of whose ids are
MBPP's, has its official splits.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, overload

from agentrl.codedata import COLUMNS, Draft, content_hash, draft_of
from agentrl.env import Step
from agentrl.errors import BadConfig, BadData, UserError, did_you_mean
from agentrl.evalplus import plus_problem
from agentrl.judge import Problem, problem_to_json
from agentrl.registry import check_sandbox, make_reward
from agentrl.reward import Evidence, Reward, as_score
from agentrl.rows import Files, Hub, Row, find_source
from agentrl.sandbox import Limits, Sandbox
from agentrl.sandboxing.backends import limits_for, shared_backend
from agentrl.threads import in_thread
from agentrl.tool_env import ToolEnv
from agentrl.types import Message, Task

__all__ = ["Code"]

Feedback = Literal["public", "verdict"]

_BUNDLED = Path(__file__).parent / "data" / "basics.jsonl"
_TEST_SHARE = 5  # one bundled task of this many belongs to the test split
_PRESETS: Mapping[str, Hub] = {
    "humaneval": Hub("openai/openai_humaneval", None, {"test": "test"}),
    "humanevalplus": Hub("evalplus/humanevalplus", None, {"test": "test"}),
    "mbpp": Hub("google-research-datasets/mbpp", "sanitized", {"train": "train", "test": "test"}),
    "mbppplus": Hub("evalplus/mbppplus", None, {"test": "test"}),
}
_MBPP = range(1, 975)  # task ids
_MBPP_TEST = range(11, 511)  # the paper's split (arXiv 2108.07732, section 2.1)
_SHOWN = "The public tests show, on purpose, how the program fails them"


class Code(ToolEnv):
    """Write a program that passes the tests."""

    reward = "unit_tests"
    max_turns = 1

    def __init__(
        self,
        *,
        dataset: str = "basics",
        splits: Mapping[str, str] | None = None,
        columns: Mapping[str, str] | None = None,
        visible: int | None = None,
        limit: int | None = None,
        prompt: str = "{statement}\n\nGive the whole program in one ```python block.",
        turns: int = 1,
        feedback: Feedback | None = None,
        mode: Literal["all", "fraction"] = "all",
        sandbox: str = "auto",
        cpu_s: float | None = 10.0,
        memory_mib: int | None = 512,
        **settings: Any,
    ) -> None:
        """``visible``: how many of a data set's tests are public where it does not say so itself. ``limit``:
        at most this many tasks of each split. ``feedback``: what several turns are told of, "public" where it
        is None. ``mode``, ``sandbox``, ``cpu_s`` and ``memory_mib`` are the reward's, ``unit_tests``."""
        if "{statement}" not in prompt:
            raise BadConfig(f"Code(prompt={prompt!r}): it must contain {{statement}}, where the problem goes")
        for name, value, least in (("limit", limit, 1), ("turns", turns, 1), ("visible", visible, 0)):
            if value is not None and value < least:
                raise BadConfig(f"Code({name}={value}): it must be at least {least}")
        for name in columns or {}:
            if name not in COLUMNS:
                raise BadConfig(
                    f"Code(columns=...) has {name!r}{did_you_mean(name, COLUMNS)}; "
                    f"it takes {', '.join(COLUMNS)}"
                )
        check_sandbox(sandbox)
        turns = _checked_turns(turns, settings, feedback)
        self._source, selected = _source(dataset, splits, has_columns=bool(columns))
        self.splits = tuple(self._source.splits)  # type: ignore[misc]  # which they are depends on the data
        self._read = functools.partial(
            _read,
            self._source,
            selected,
            columns=columns or {},
            visible=visible,
            limit=limit,
            open_sandbox=functools.partial(_open_sandbox, sandbox, is_limited=cpu_s is not None),
        )
        self._prompt, self._feedback = prompt, feedback or "public"
        if turns > 1:
            self.declared = {"user": _SHOWN}  # type: ignore[misc]  # of these settings alone
        if "reward" not in settings:
            settings["reward"] = _unit_tests(mode, sandbox, cpu_s, memory_mib)
        super().__init__(**{"max_turns": turns, **settings})

    def tasks(self, split: str) -> Sequence[Task]:
        """Every row of the split as a task; what needs a sandbox is made when it is asked for."""
        drafts = self._read(split)
        if (
            self.max_turns > 1
            and self._feedback == "public"
            and not any(draft.has_visible for draft in drafts)
        ):
            raise BadConfig(
                f"no task of the split {split!r} of {self._source.name} has a public test, so that of its "
                f"{self.max_turns} turns only the first is ever taken: make tests public, with visible=1 or "
                "in the data set, or set feedback='verdict' or turns=1"
            )
        return _Tasks(drafts, self._prompt)

    def find_task(self, task_id: str) -> Task:
        for split in self.splits:
            tasks = self.task_list(split)
            if isinstance(tasks, _Tasks) and task_id in tasks.places:
                return tasks[tasks.places[task_id]]
        return super().find_task(task_id)

    def gold(self, task: Task) -> tuple[Message, ...]:
        """The solution that the data set has. Raises UserError where it has none."""
        if not task.truth["gold"]:
            raise UserError(
                f"task {task.id!r} has no solution in its data set: name its column, or do without"
            )
        return (Message("assistant", _fenced(task.truth["gold"])),)

    def as_submission(
        self, task: Task, code: str, files: Mapping[str, str] | None = None
    ) -> tuple[Message, ...]:
        """``code`` as the answer of every turn, without ``files``: an answer is one program."""
        return (Message("assistant", _fenced(code)),) * self.max_turns

    async def astep(self, action: Message) -> Step:
        """An answer that fails a public test is told so, and may be tried again."""
        if action.tool_calls or self._turns + 1 >= self.max_turns:
            return await super().astep(action)
        self.accept(action)
        self._turns += 1
        with self._timing("reward"), self._naming("reward"):
            told = await in_thread(self._told)
        if not told:
            return await self._finish("answered")
        return self.transition(Message("user", told))

    def _told(self) -> str:
        """What the policy reads of its answer; "": it is taken as it is."""
        problem = self.task.truth["problem"]
        public = [test for test in problem["tests"] if test["visible"]]
        if public:
            truth = {**self.task.truth, "problem": {**problem, "tests": public}}
            note = self._failure(replace(self.task, truth=truth))
            if note is not None:
                return f"A public test failed. {note}\nCorrect the program and give all of it."
        if self._feedback == "verdict" and self._failure(self.task) is not None:
            return "The public tests pass, and a hidden one failed. Correct the program and give all of it."
        return ""

    def _failure(self, task: Task) -> str | None:
        """What the reward notes of the last answer, with the truth of ``task``; None where it passes."""
        evidence = Evidence(task, self.messages, self, self.completion_tokens)
        score = as_score(self._reward(evidence), self._reward)
        return None if score.value >= 1 else score.note


class _Tasks(Sequence[Task]):
    """The tasks of a split; each is made when it is first asked for."""

    def __init__(self, drafts: Sequence[Draft], prompt: str) -> None:
        self._drafts, self._prompt = drafts, prompt
        self._made: dict[int, Task] = {}
        self.places = {draft.id: place for place, draft in enumerate(drafts)}  # by id
        for place, draft in enumerate(drafts):
            if self.places[draft.id] != place:
                raise _of_one_id(draft, drafts[self.places[draft.id]])

    def __len__(self) -> int:
        return len(self._drafts)

    @overload
    def __getitem__(self, index: int) -> Task: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Task]: ...
    def __getitem__(self, index: int | slice) -> Task | Sequence[Task]:
        if isinstance(index, slice):
            return [self[place] for place in range(len(self))[index]]
        place = range(len(self))[index]
        if place not in self._made:
            self._made[place] = self._task(self._drafts[place])
        return self._made[place]

    def _task(self, draft: Draft) -> Task:
        made = draft.task()
        return Task(
            id=made.id,
            prompt=(Message("user", self._prompt.replace("{statement}", made.statement)),),
            truth={"problem": problem_to_json(made.problem), "gold": made.solution},
            meta={**made.meta, "content_hash": content_hash(made.statement)},
        )


def _of_one_id(one: Draft, other: Draft) -> BadData:
    where = f"{one.place} and {other.place}"
    if one.has_own_id or other.has_own_id:
        return BadData(f"{where}: two rows have the id {one.id!r}: each has its own, or none has one")
    return BadData(
        f"{where}: two rows have the same statement, and no id beside it: give each row an id in the column "
        "'id', or name its column with columns={'id': ...}, or remove one"
    )


Selected = Callable[[Row, str], bool]  # whether a row belongs to a split


def _checked_turns(turns: int, settings: Mapping[str, Any], feedback: Feedback | None) -> int:
    """How many turns there are. Raises BadConfig for settings that would have no effect."""
    most = settings.get("max_turns")
    if most is not None and 0 < most < turns:
        raise BadConfig(
            f"Code(turns={turns}, max_turns={most}): only {most} would be taken; leave max_turns out"
        )
    turns = turns if most is None else most
    if feedback is not None and turns == 1:
        raise BadConfig(
            f"Code(feedback={feedback!r}) has no effect with turns=1: set turns=2 or more, or leave it out"
        )
    return turns


def _source(
    dataset: str, splits: Mapping[str, str] | None, *, has_columns: bool
) -> tuple[Files | Hub, Selected]:
    if dataset == "basics":
        if splits:
            raise BadConfig("Code(dataset='basics', splits=...): the bundled suite has its own splits")
        return Files("the bundled suite", {"train": _BUNDLED, "test": _BUNDLED}), _in_bundled_split
    source = find_source(dataset, presets=_PRESETS, splits=splits, asked_by="Code")
    if isinstance(source, Files) and len(source.splits) == 1 and not splits:
        (path,) = source.splits.values()
        columns = _columns(path, path.stat().st_mtime_ns)
        if "test_list" in columns and "test" not in columns:
            found = () if has_columns else _mbpp_splits(path, path.stat().st_mtime_ns)
            if found:
                return Files(source.name, dict.fromkeys(found, path)), _in_mbpp_split
            return source, _in_any_split
        if "canonical_solution" in columns:  # a benchmark
            return Files(source.name, {"test": path}), _in_any_split
    return source, _in_any_split


@functools.lru_cache(maxsize=64)
def _columns(path: Path, changed: int) -> frozenset[str]:
    """Of the first row of a file as it was ``changed``."""
    _, row = next(Files(str(path), {"": path}).rows(""), ("", {}))
    return frozenset(row)


@functools.lru_cache(maxsize=64)
def _mbpp_splits(path: Path, changed: int) -> tuple[str, ...]:
    """Which official splits a file as it was ``changed`` has rows of; none where an id is not MBPP's."""
    found = set()
    for _, row in Files(str(path), {"": path}).rows(""):
        number = row.get("task_id")
        if type(number) is not int or number not in _MBPP:
            return ()
        found.add("test" if number in _MBPP_TEST else "train")
    return tuple(split for split in ("train", "test") if split in found)


def _in_any_split(row: Row, split: str) -> bool:
    return True


def _in_mbpp_split(row: Row, split: str) -> bool:
    return (row.get("task_id") in _MBPP_TEST) == (split == "test")


def _in_bundled_split(row: Row, split: str) -> bool:
    digest = hashlib.sha256(" ".join(str(row["statement"]).split()).encode()).digest()
    return (digest[0] % _TEST_SHARE == 0) == (split == "test")


def _read(
    source: Files | Hub,
    selected: Selected,
    split: str,
    *,
    columns: Mapping[str, str],
    visible: int | None,
    limit: int | None,
    open_sandbox: Callable[[Limits], Sandbox],
) -> list[Draft]:
    """The tasks of a split, without their problems where these take a sandbox. Raises BadData."""

    def expected(row: Row, place: str) -> Problem:
        return plus_problem(row, place, open_sandbox=open_sandbox)

    def drafts() -> Iterator[Draft]:
        for place, row in source.rows(split):
            if selected(row, split):
                yield draft_of(row, place, columns=columns, visible=visible, expected=expected)

    read = list(islice(drafts(), limit))
    if not read:
        raise BadData(f"the split {split!r} of {source.name} has no rows: give one JSON object per line")
    return read


def _open_sandbox(sandbox: str, limits: Limits, *, is_limited: bool) -> Sandbox:
    """A sandbox for a reference."""
    if not is_limited:
        limits = limits_for(sandbox, replace(limits, cpu_s=None, memory_mib=None))
    return shared_backend(sandbox, limits).open(limits)


@functools.cache
def _unit_tests(mode: str, sandbox: str, cpu_s: float | None, memory_mib: int | None) -> Reward:
    return make_reward("unit_tests", mode=mode, sandbox=sandbox, cpu_s=cpu_s, memory_mib=memory_mib)


def _fenced(code: str) -> str:
    """``code`` in a fence that it does not close itself."""
    fence = "```"
    while fence in code:
        fence += "`"
    return f"{fence}python\n{code.rstrip()}\n{fence}"
