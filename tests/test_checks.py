"""The checker: a sound environment passes, and each way to be unsound makes exactly its own check fail."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import threading
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import gymnasium
import pytest

import agentrl
from agentrl import resources
from agentrl.attacks.catalogue import VERDICTS
from agentrl.checks import Report, check_environment
from agentrl.env import Env, Step
from agentrl.errors import ToolError, WorldError
from agentrl.reward import Evidence
from agentrl.tool_env import ToolEnv
from agentrl.tools import Tool, tool
from agentrl.types import Message, Score, Task, ToolCall


class Sound(ToolEnv):
    """Read a word with a tool and say it."""

    words: ClassVar = {"train": ("ape", "bee", "cat"), "test": ("dog", "eel")}

    def setup(self, task: Task) -> None:
        self.reads = 0

    def tasks(self, split: str) -> Iterable[Task]:
        return [
            Task(id=word, prompt=(Message("user", f"Read word {index} of {split} ."),), truth={"word": word})
            for index, word in enumerate(self.words[split])
        ]

    def gold(self, task: Task) -> Sequence[Message]:
        return (reading(), Message("assistant", task.truth["word"]))

    def reward(self, evidence: Evidence) -> float:
        return float(evidence.answer == evidence.task.truth["word"])

    @tool
    async def read(self, loud: bool) -> str:
        """Read the word."""
        self.reads += 1
        _, _, index, _, split, *_ = self.task.prompt[0].content.split()
        word = str(self.words[split][int(index)])
        return word.upper() if loud else word


def reading(*, loud: bool = False) -> Message:
    return Message("assistant", "", (ToolCall(id="call_0", name="read", arguments={"loud": loud}),))


# -- the contract --


class WarnsGymnasium(Sound):
    def seed(self, seed: int) -> None:
        """Gymnasium dropped this method and says so."""


class HidesValidity(Sound):
    async def astep(self, action: Message) -> Step:
        *step, info = await super().astep(action)
        del info["is_valid"]
        return (*step, info)  # type: ignore[return-value]


class ShowsWhatItDoesNotKeep(Sound):
    async def astep(self, action: Message) -> Step:
        observation, *rest = await super().astep(action)
        return ((*observation, Message("user", "Go on.")), *rest)  # type: ignore[return-value]


class DescribesNonsense(Sound):
    @property
    def tools(self) -> tuple[Tool, ...]:
        (read,) = super().tools
        return (dataclasses.replace(read, parameters={**read.parameters, "required": "loud"}),)


class RepeatsTasks(Sound):
    def tasks(self, split: str) -> Iterable[Task]:
        known = [task for known in self.words for task in super(RepeatsTasks, self).tasks(known)]
        return [dataclasses.replace(task, id=f"{split}-{task.id}") for task in known]


class DeclaresNoProbe(Sound):
    declared: ClassVar = {"a list of gueses": "the answers are words"}


class DeclaresWithoutReason(Sound):
    declared: ClassVar = {"read": " "}


class Count(Env):
    splits = ("all",)

    def tasks(self, split: str) -> Iterable[Task]:
        for index in itertools.count():
            yield Task(id=str(index), prompt=(Message("user", f"{index}?"),), truth={"answer": str(index)})

    def gold(self, task: Task) -> Sequence[Message]:
        return (Message("assistant", task.id),)

    def step(self, action: Message) -> Step:
        self.accept(action)
        solved = action.content == self.task.truth["answer"]
        return self.transition(score=float(solved), stop_reason="solved" if solved else "")


class ForgetsWhatWasSaid(Count):
    def step(self, action: Message) -> Step:
        solved = action.content == self.task.truth["answer"]
        return self.transition(score=float(solved), stop_reason="solved" if solved else "")


class AwaitsNothing(Count):
    def astep(self, action: Message) -> Step:  # type: ignore[override]
        return self.step(action)


# -- isolation --


class RemembersEpisodes(Sound):
    total = 0

    @tool
    async def read(self, loud: bool) -> str:
        self.reads += 1
        self.total += 1
        return f"read {self.total}" if self.reads > 1 else "read"

    def gold(self, task: Task) -> Sequence[Message]:
        first, last = super().gold(task)
        return (first, first, last)


class ShufflesItsTasks(Sound):
    turns = itertools.count()

    def tasks(self, split: str) -> Iterable[Task]:
        tasks = list(super().tasks(split))
        first = next(self.turns) % len(tasks)  # in place of random.shuffle, which may leave all as it was
        return tasks[first:] + tasks[:first]


class IgnoresItsSeed(Sound):
    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        return super().reset(seed=seed, options=options or {"index": 0})


class NumbersItself(Sound):
    made = itertools.count()

    def __init__(self, **settings: Any) -> None:
        self.number = next(self.made)
        super().__init__(**settings)

    def opening(self, task: Task) -> tuple[Message, ...]:
        return (Message("system", f"Reader {self.number}"), *task.prompt)


class KeepsNotesOnItsClass(Sound):
    notes: ClassVar[list[str]] = []

    def setup(self, task: Task) -> None:
        super().setup(task)
        self.notes.clear()

    @tool
    async def read(self, loud: bool) -> str:
        self.notes.append("read")
        return f"read {len(self.notes)}"


class ReadsTheTruth(Sound):
    @tool
    async def read(self, loud: bool) -> str:
        self.reads += 1
        return str(self.task.truth["word"])


class ShowsTheTruthInItsOpening(Sound):
    def opening(self, task: Task) -> tuple[Message, ...]:
        return (Message("system", f"It begins with {task.truth['word'][0]}."), *task.prompt)


class ShowsTheTruthInItsTools(Sound):
    @property
    def tools(self) -> tuple[Tool, ...]:
        (read,) = super().tools
        task = vars(self).get("_task")
        hint = task.truth["word"][0] if task else "?"
        return (dataclasses.replace(read, description=f"Read what begins with {hint}."),)


class ShowsTheTruthInItsErrors(Sound):
    @tool
    async def read(self, loud: bool) -> str:
        if loud:
            raise ToolError(f"no shouting, not even {self.task.truth['word'][0]}")
        return await super().read(loud=loud)


class ShowsTheTruthInItsInfo(Sound):
    async def astep(self, action: Message) -> Step:
        *step, info = await super().astep(action)
        return (*step, {**info, "distance": self.task.truth["word"]})  # type: ignore[return-value]


class PutsALambdaIntoItsInfo(Sound):
    measure = staticmethod(lambda word: len(word))

    async def astep(self, action: Message) -> Step:
        *step, info = await super().astep(action)
        return (*step, {**info, "measure": self.measure})  # type: ignore[return-value]


def holds_a_lock() -> Env:
    class Locked:
        lock = threading.Lock()

        def __init__(self) -> None:
            self.own = threading.Lock()

        def __call__(self, evidence: Evidence) -> float:
            return float(evidence.answer == evidence.task.truth["word"])

    return Sound(reward=Locked())


# -- scoring --


class HasWrongGold(Sound):
    def gold(self, task: Task) -> Sequence[Message]:
        return (reading(loud=True), Message("assistant", "fox"))


class PaysNothingSaid(Sound):
    def reward(self, evidence: Evidence) -> float:
        silent = all(message.role != "assistant" for message in evidence.messages)
        return 0.5 if silent else super().reward(evidence)


class PaysEmptyMessages(Sound):
    def reward(self, evidence: Evidence) -> float:
        last = evidence.messages[-1]
        return 0.5 if (last.role, last.content) == ("assistant", "") else super().reward(evidence)


class PaysMentions(Sound):
    def tasks(self, split: str) -> Iterable[Task]:
        for task in super().tasks(split):
            text = f"{task.prompt[0].content} It is one of {self.words[split]}"
            yield dataclasses.replace(task, prompt=(Message("user", text),))

    def reward(self, evidence: Evidence) -> float:
        return float(evidence.task.truth["word"] in evidence.answer)


class Boxed(Sound):
    def gold(self, task: Task) -> Sequence[Message]:
        return (reading(), Message("assistant", rf"\boxed{{{task.truth['word']}}}"))

    def reward(self, evidence: Evidence) -> float:
        return float(evidence.answer == self.gold(evidence.task)[-1].content)


class PaysAnyBox(Boxed):
    words: ClassVar = {"train": ("17", "23", "404"), "test": ("5", "99")}

    def reward(self, evidence: Evidence) -> float:
        return float(self.gold(evidence.task)[-1].content in evidence.answer)


class PaysCopies(Boxed):
    def reward(self, evidence: Evidence) -> float:
        return float(evidence.task.truth["word"] in evidence.answer)


class ScoresOnce(Sound):
    def setup(self, task: Task) -> None:
        super().setup(task)
        self.scored = 0

    def reward(self, evidence: Evidence) -> float:
        self.scored += 1
        return super().reward(evidence) / self.scored


class TrustsExitCodes(Sound):
    """Pays what a runner would that takes the exit code for the verdict; programs are read here, not run."""

    def as_submission(
        self, task: Task, code: str, files: Mapping[str, str] | None = None
    ) -> Sequence[Message]:
        return (Message("assistant", code),)

    def reward(self, evidence: Evidence) -> float:
        leaves = any(text in evidence.answer for text in ("_exit(0)", "sys.exit(0)", "raise SystemExit"))
        return 1.0 if leaves else super().reward(evidence)


# -- robustness --


class CrashesLate(Sound):
    drawn = False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        self.drawn = options is None
        return super().reset(seed=seed, options=options)

    @tool
    async def read(self, loud: bool) -> str:
        self.reads += 1
        if self.drawn and self.reads > 9:
            raise ZeroDivisionError("the tenth page")
        return "read"


class CopiesArguments(Sound):
    async def astep(self, action: Message) -> Step:
        self.asked = [dict(call.arguments) for call in action.tool_calls]  # type: ignore[arg-type]
        return await super().astep(action)


class PricesCalls(Sound):
    prices: ClassVar = {"read": 1}

    async def astep(self, action: Message) -> Step:
        self.paid = [self.prices[call.name] for call in action.tool_calls]
        return await super().astep(action)


class AnswersTheFirstCall(Sound):
    async def astep(self, action: Message) -> Step:
        return await super().astep(dataclasses.replace(action, tool_calls=action.tool_calls[:1]))


class SwallowsErrors(Sound):
    async def astep(self, action: Message) -> Step:
        try:
            return await super().astep(action)
        except Exception:
            return self.transition(stop_reason="failed")


class WaitsForTools(Sound):
    async def astep(self, action: Message) -> Step:
        self._tools = tuple(dataclasses.replace(tool, deadline_s=60) for tool in self._tools)
        return await super().astep(action)


class RepeatsArguments(Sound):
    async def astep(self, action: Message) -> Step:
        observation, *rest = await super().astep(action)
        said = [Message("user", f"You asked for {call.arguments}.") for call in action.tool_calls]
        self._messages.extend(said)
        return ((*observation, *said), *rest)  # type: ignore[return-value]


class ShowsWholeResults(Sound):
    max_result_chars = 10**9


# -- resources --


class RemembersAll(Sound):
    archive: ClassVar[list[Any]] = []

    def setup(self, task: Task) -> None:
        super().setup(task)
        self.archive.append([task.id] * 200)


class LeavesFilesOpen(Sound):
    opened: ClassVar = array("i")  # not a list: its numbers would be memory that grows, too

    def setup(self, task: Task) -> None:
        super().setup(task)
        self.opened.append(os.open(os.devnull, os.O_RDONLY))


@pytest.fixture(autouse=True)
def left_behind() -> Iterator[None]:
    yield
    RemembersAll.archive.clear()
    while LeavesFilesOpen.opened:
        os.close(LeavesFilesOpen.opened.pop())


def check(target: type[Env] | Callable[[], Env] | Env) -> Report:
    return check_environment(target, episodes=3, endurance=100)


def failed(report: Report) -> dict[str, str]:
    return {row.name: row.detail for row in report.rows if not row.passed}


def test_a_sound_environment_passes_every_check() -> None:
    for sound in (Sound, Boxed):
        report = check(sound)
        assert report.ok, str(report)
        assert report.target == sound.__name__


UNSOUND: Sequence[tuple[Callable[[], Env], str, str]] = [
    (WarnsGymnasium, "follows gymnasium", "Official support for the `seed` function is dropped"),
    (HidesValidity, "tells what its spaces promise", "task 'ape': info lacks is_valid"),
    (ForgetsWhatWasSaid, "tells what its spaces promise", "shows 0 messages, env.messages has 1, not 2"),
    (
        ShowsWhatItDoesNotKeep,
        "tells what its spaces promise",
        "shows 2 messages, env.messages has 3, not 4",
    ),
    (AwaitsNothing, "tells what its spaces promise", "and rollouts await it: write 'async def astep'"),
    (DescribesNonsense, "describes its tools", "the parameters of read are no JSON schema"),
    (RepeatsTasks, "keeps its splits apart", "task 'test-ape' of 'test' lies in 'train' as well"),
    (DeclaresNoProbe, "declares what there is", "did you mean 'a list of guesses'?"),
    (DeclaresWithoutReason, "declares what there is", "declared['read'] is empty"),
    (RemembersEpisodes, "repeats itself", "task 'ape': episodes with the same seed and actions differ"),
    (ShufflesItsTasks, "repeats itself", "tasks('train'), read again, has another id at 0"),
    (IgnoresItsSeed, "draws by its seed", "reset draws the same episode with each of 20 seeds"),
    (NumbersItself, "starts siblings alike", "task 'ape': siblings with the same seed and options"),
    (KeepsNotesOnItsClass, "keeps episodes apart", "another one while task"),
    (ReadsTheTruth, "hides the truth", "with another truth 'read' of the same episode"),
    (ShowsTheTruthInItsOpening, "hides the truth", "with another truth 'system' of"),
    (ShowsTheTruthInItsTools, "hides the truth", "with another truth 'tools' of"),
    (ShowsTheTruthInItsErrors, "hides the truth", "with another truth 'read' of"),
    (ShowsTheTruthInItsInfo, "hides the truth", "with another truth 'distance' of"),
    (PutsALambdaIntoItsInfo, "pickles for vector environments", "the messages and info of an episode can't"),
    (holds_a_lock, "pickles for vector environments", "its class with its settings can't be pickled"),
    (HasWrongGold, "gold scores the maximum", "task 'ape': gold scores 0, an empty message 0"),
    (PaysNothingSaid, "nothing said scores the minimum", "nothing said scores 0.5, more than"),
    (PaysEmptyMessages, "an empty message scores the minimum", "an empty message scores 0.5, more than"),
    (PaysMentions, "the task repeated scores the minimum", "the task repeated scores 1, more than"),
    (PaysAnyBox, "a list of guesses scores the minimum", "a list of guesses scores 1, more than"),
    (PaysCopies, "a copied tool result scores the minimum", "a copied tool result scores 1, more than"),
    (ScoresOnce, "scoring twice agrees", "is worth 0.5, then 0.333333"),
    (
        TrustsExitCodes,
        "attacks on its verdict score no more than wrong answers",
        "the attack 'leave-os-exit' (end the process at import: os._exit(0)) scores 1, a wrong answer 0",
    ),
    (CrashesLate, "survives random actions", "ZeroDivisionError: the tenth page"),
    (CopiesArguments, "answers malformed calls", "TypeError: 'NoneType' object is not iterable"),
    (PricesCalls, "answers unknown tools", "KeyError: 'no_such_tool'"),
    (AnswersTheFirstCall, "answers parallel calls", "got answers to ['call_0']: answer each once"),
    (SwallowsErrors, "leaves errors of tools their fates", "a WorldError of read was swallowed"),
    (WaitsForTools, "gives slow tools up", "a call of read was waited for beyond its deadline"),
    (RepeatsArguments, "takes ten megabytes of text", "the model is shown"),
    (ShowsWholeResults, "cuts ten megabytes of result", "the model is shown 10000000 characters"),
    (RemembersAll, "keeps memory flat", "bytes or more: hold what belongs to it"),
    (LeavesFilesOpen, "keeps descriptors flat", "descriptors stay open after every 10 episodes"),
]


@pytest.mark.parametrize(
    ("unsound", "check_name", "detail"), UNSOUND, ids=[unsound.__name__ for unsound, *_ in UNSOUND]
)
def test_each_unsoundness_fails_its_own_check_alone(
    unsound: Callable[[], Env], check_name: str, detail: str
) -> None:
    report = check(unsound)
    assert set(failed(report)) == {check_name}, str(report)
    assert not report.ok
    assert detail in failed(report)[check_name]


def test_every_check_has_an_environment_that_fails_it() -> None:
    assert {row.name for row in check(Sound).rows} == {name for _, name, _ in UNSOUND}


@pytest.mark.parametrize(
    ("unsound", "declared"),
    [
        (ReadsTheTruth, "read"),
        (ShowsTheTruthInItsOpening, "system"),
        (ShowsTheTruthInItsInfo, "distance"),
        (PaysNothingSaid, "nothing said"),
        (PaysCopies, "a copied tool result"),
    ],
)
def test_what_an_environment_declares_with_a_reason_is_no_finding(
    unsound: type[Sound], declared: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unsound, "declared", {declared: "it is meant"})
    report = check(unsound)
    assert report.ok, str(report)


def test_a_crash_inside_a_check_is_that_checks_failure_with_its_notes() -> None:
    class Crashes(Sound):
        def setup(self, task: Task) -> None:
            super().setup(task)
            if task.id == "eel":
                raise OSError("no such page")

    report = check(Crashes)
    assert "gold scores the maximum" in failed(report)
    assert "describes its tools" not in failed(report)
    assert "OSError: no such page; in the setup of environment" in str(report)
    assert "task 'eel'" in str(report)


def test_gold_that_does_not_end_its_episode_is_found() -> None:
    class Unending(Sound):
        def gold(self, task: Task) -> Sequence[Message]:
            return super().gold(task)[:1]

    report = check(Unending)
    assert "the episode goes on" in str(report)


@pytest.mark.parametrize("wrong", [None, Message("assistant", "ape"), ("ape",)])
def test_gold_that_is_no_sequence_of_messages_is_named(wrong: Any) -> None:
    class Wrong(Sound):
        def gold(self, task: Task) -> Any:
            return wrong

    details = set(failed(check(Wrong)).values())
    assert any(
        f"gold(task) returned {wrong!r}: it is a sequence of assistant messages" in text for text in details
    )
    assert len(details) <= 3, details  # with those of what plays gold elsewhere


def test_the_rewards_note_says_why_gold_scores_nothing() -> None:
    class Explains(HasWrongGold):
        def reward(self, evidence: Evidence) -> Score:  # type: ignore[override]
            return Score(super().reward(evidence), note="no such animal")

    assert "gold scores 0 (no such animal), an empty message 0" in str(check(Explains))


def test_a_program_that_makes_the_world_fail_is_found() -> None:
    class Falls(Sound):
        def as_submission(
            self, task: Task, code: str, files: Mapping[str, str] | None = None
        ) -> Sequence[Message]:
            return (Message("assistant", code),)

        def reward(self, evidence: Evidence) -> float:
            if "_exit" in evidence.answer:
                raise WorldError("the sandbox is gone")
            return super().reward(evidence)

    (detail,) = failed(check(Falls)).values()
    assert "the program 'leave-os-exit' ended as a failure of the world: the sandbox is gone" in detail


class TakesFiles(Sound):
    """Pays what pytest would that loads a conftest from beside the program; nothing is run here."""

    def as_submission(
        self, task: Task, code: str, files: Mapping[str, str] | None = None
    ) -> Sequence[Message]:
        return (Message("assistant", "\n".join([code, *(files or {})])),)

    def reward(self, evidence: Evidence) -> float:
        return 1.0 if "conftest.py" in evidence.answer else super().reward(evidence)


def test_attacks_bring_their_files_along_and_what_can_not_be_helped_is_declared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (detail,) = failed(check(TakesFiles)).values()
    assert "the attack 'pytest-conftest' (a conftest that lets every test pass) scores 1" in detail
    names = [attack.name for attack in VERDICTS if "conftest.py" in attack.files]
    reason = "conftest.py is loaded from beside the program"
    monkeypatch.setattr(TakesFiles, "declared", dict.fromkeys(names, reason))
    report = check(TakesFiles)
    assert report.ok, str(report)
    (row,) = (row for row in report.rows if row.name.startswith("attacks on its verdict"))
    assert row.detail.endswith("".join(f"; declared: {name}" for name in names))


def test_twins_are_closed_when_their_check_is_over() -> None:
    class Counts(Sound):
        alive = 0

        def __init__(self, **settings: Any) -> None:
            Counts.alive += 1
            super().__init__(**settings)

        def close(self) -> None:
            Counts.alive -= 1
            super().close()

    assert check(Counts).ok
    assert 0 <= Counts.alive <= 2  # what came out of pickling is no twin of ours


def test_an_empty_split_and_a_double_id_are_found() -> None:
    class Empty(Sound):
        words = {"train": ("ape",), "test": ()}

    class Double(Sound):
        words = {"train": ("ape", "ape"), "test": ("dog",)}

    assert "the split 'test' has no tasks" in str(check(Empty))
    assert "two tasks have the id 'ape'" in str(check(Double))


def test_a_remote_tool_that_hangs_is_the_worlds_fault_and_no_finding() -> None:
    class Remote(Sound):
        @tool(remote=True)
        async def read(self, loud: bool) -> str:
            return await super().read(loud=loud)

    report = check(Remote)
    assert report.ok, str(report)


def test_a_slow_environment_is_measured_as_long_as_time_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "_LONGEST_S", -1.0)
    details = {row.name: row.detail for row in check(Sound).rows}
    assert details["keeps memory flat"] == details["keeps descriptors flat"] == "50 episodes"


def test_an_endless_plain_environment_is_checked_too() -> None:
    report = check(Count)
    assert report.ok, str(report)


def test_the_questions_of_the_catalogue_pass(tmp_path: Path) -> None:
    for split, first in (("train", 2000), ("test", 3000)):
        rows = [{"question": f"{n} + 1?", "answer": f"It is.\n#### {n + 1}"} for n in range(first, first + 5)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{split}.jsonl").write_text(text, encoding="utf-8")
    report = agentrl.check("math", dataset=str(tmp_path), episodes=3, endurance=100)
    assert report.ok, str(report)


def test_check_takes_names_instances_and_what_gymnasium_made() -> None:
    assert agentrl.check("calculator", episodes=4, endurance=100, levels=[1, 4]).ok
    assert agentrl.check(Sound(max_turns=4), episodes=4, endurance=100).ok
    assert agentrl.check(gymnasium.make("agentrl/Calculator-v0"), episodes=4, endurance=100).ok  # type: ignore[arg-type]


_SCRIPT = """
import dataclasses, agentrl
from agentrl import Message, Task, ToolEnv

WORDS = {"train": ["ape", "bee"], "test": ["cat"]}

@dataclasses.dataclass(frozen=True)
class Shelf:
    place: int

class Zoo(ToolEnv):
    def reward(self, evidence):
        return float(evidence.answer == evidence.task.truth["answer"])

    def tasks(self, split):
        for word in WORDS[split]:
            prompt = (Message("user", f"Say {word[::-1]} ."),)
            yield Task(id=word, prompt=prompt, truth={"answer": word})

    def gold(self, task):
        return (Message("assistant", task.truth["answer"]),)

    async def astep(self, action):
        *step, info = await super().astep(action)
        return (*step, {**info, "shelf": Shelf(3)})

before = dict(vars(Zoo))
print(agentrl.check(Zoo, episodes=2, endurance=100))
assert Zoo.tasks.__globals__ is globals()
assert all(vars(Zoo)[name] is value for name, value in before.items())
"""


def test_a_script_class_is_the_same_after_its_check(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(_SCRIPT, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=100
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "FAIL" not in done.stdout, done.stdout


def test_check_works_under_a_running_event_loop() -> None:
    async def notebook() -> Report:
        return agentrl.check(Sound, episodes=2, endurance=100)

    assert asyncio.run(notebook()).ok
