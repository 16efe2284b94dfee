"""What is trained on is, id for id, what the engine saw and said, over hundreds of episodes of many turns."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from agentrl.chat import History
from agentrl.chats import Chats
from agentrl.config import RolloutConfig
from agentrl.engine import Adapter, Sampling
from agentrl.env import Step
from agentrl.errors import ToolError
from agentrl.parsers import detect_parser, get_parser
from agentrl.rollout import EpisodePlan, Rollouts
from agentrl.samples import to_samples
from agentrl.seeds import derive
from agentrl.tiny import TinyShape, make_tiny_model
from agentrl.tool_env import ToolEnv
from agentrl.tools import tool
from agentrl.types import Completion, FloatArray, IntArray, Message, Sample, Task, Trajectory

TEMPLATES = Path(__file__).parent / "templates"
# The tokens of each template that the tiny tokenizer lacks; the first, if any, begins a text.
ADDED = {
    "qwen3_like": (),
    "llama3_json_like": (
        "<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|python_tag|>",
    ),
    "gemma_pythonic_like": ("<bos>", "<start_of_turn>", "<end_of_turn>"),
}  # fmt: skip
PARSERS = {"qwen3_like": "hermes", "llama3_json_like": "llama3_json", "gemma_pythonic_like": "pythonic"}
TASKS, SIBLINGS = 8, 5  # of each template under each history: 240 episodes in all
TURN_TOKENS, EPISODE_TOKENS = 150, 2200


class Errands(ToolEnv):
    """Three questions in a row, and tools that answer, refuse, forge and flood."""

    max_turns = 7

    def tasks(self, split: str) -> Sequence[Task]:
        return [Task(id=f"{split}-{n}", prompt=(Message("user", f"What is {n} + 2?"),)) for n in range(TASKS)]

    def setup(self, task: Task) -> None:
        self.questions = 2

    async def astep(self, action: Message) -> Step:
        if action.tool_calls or not self.questions:
            return await super().astep(action)
        self.accept(action)
        self.questions -= 1
        return self.transition(Message("user", "Are you <|im_start|>sure?"))

    @tool
    async def add(self, a: int, b: int) -> int:
        """Add two numbers."""
        if a > 5:
            raise ToolError("too <|im_end|> large")
        return a + b

    @tool
    async def look_up(self, word: str) -> str:
        """Look a word up."""
        return f"{word}: é 你好 👩‍🔬 </tool_response><|eot_id|><end_of_turn>\n" + "many words " * 6 * len(
            word
        )

    def reward(self, evidence: Any) -> float:
        return len(evidence.messages) / 7


@dataclass
class Babbler:
    """Says calls, good and bad, thoughts, answers and noise, as the request's seed has it.

    Keeps what it saw and said by that seed, which no two turns share.
    """

    tokenizer: Any
    family: str  # of the calls
    heard: dict[int, tuple[IntArray, Completion]] = field(default_factory=dict)

    async def generate(self, prompt_ids: IntArray, sampling: Sampling) -> Completion:
        """See :class:`agentrl.engine.Engine`."""
        random = np.random.default_rng(sampling.seed)
        for _ in range(int(random.integers(3))):  # others go first
            await asyncio.sleep(0)
        said = [*self._ids(random), int(random.choice(sampling.stop_token_ids))]
        end = next(place for place, index in enumerate(said, 1) if index in sampling.stop_token_ids)
        size = min(end, sampling.max_tokens)
        # A swap of the adapter in mid-sentence: two versions in one completion.
        versions = 3 + (np.arange(size) >= random.integers(2 * size))
        completion = Completion(
            said[:size], -random.exponential(size=size), versions, "stop" if end <= size else "length"
        )
        assert sampling.seed not in self.heard
        self.heard[sampling.seed] = (prompt_ids.copy(), completion)
        return completion

    def _ids(self, random: np.random.Generator) -> list[int]:
        kind = random.choice(
            ["calls", "thought", "answer", "noise", "endless"], p=[0.6, 0.2, 0.14, 0.03, 0.03]
        )
        if kind == "noise":
            return [int(index) for index in random.integers(len(self.tokenizer), size=20)]
        text = {
            "calls": lambda: self._calls(random),
            "thought": lambda: f"<think>\nTwo, 两个.\n</think>\n\n{self._calls(random)}",
            "answer": lambda: "It is <|im_end|ish 4. é👩‍🔬",
            "endless": lambda: f"{self._calls(random)} and so on" + ", and on" * TURN_TOKENS,
        }[str(kind)]()
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def _calls(self, random: np.random.Generator) -> str:
        """One to three calls beside one another, now and then after some words."""
        calls = [self._call(random) for _ in range(int(random.integers(1, 4)))]
        if self.family == "pythonic":
            joined = "[" + ", ".join(call[1:].removesuffix("]") for call in calls) + "]"
        else:
            joined = {"hermes": "\n", "llama3_json": "; "}[self.family].join(calls)
        return str(random.choice(["", "Let me see.\n"])) + joined

    def _call(self, random: np.random.Generator) -> str:
        name, arguments = [
            ("add", {"a": int(random.integers(9)), "b": 2}),
            ("look_up", {"word": 'é "</tool_call>" 🙂'}),
            ("look_up", {"word": "x"}),
            ("add", {"a": "one", "b": 2}),
            ("subtract", {"a": 1}),
        ][int(random.integers(5))]
        call = get_parser(self.family).render(name, arguments)  # type: ignore[attr-defined]
        return call[: -int(random.integers(2, 6))] if random.random() < 0.1 else call

    async def score(self, token_ids: IntArray, temperature: float) -> FloatArray:
        """See :class:`agentrl.engine.Engine`."""
        return np.zeros(len(token_ids), np.float32)

    async def load(self, adapter: Adapter | None, version: int) -> None:
        """See :class:`agentrl.engine.Engine`."""

    async def close(self) -> None:
        """See :class:`agentrl.engine.Engine`."""


@dataclass(frozen=True)
class Evening:
    """All episodes under one template and history, and what the engine kept of them."""

    history: History
    heard: dict[int, tuple[IntArray, Completion]]
    episodes: list[tuple[EpisodePlan, Trajectory]]

    def requests(self, plan: EpisodePlan, trajectory: Trajectory) -> list[tuple[IntArray, Completion]]:
        """(prompt, completion) of each turn, as the engine has them."""
        return [self.heard[derive(plan.seed, turn)] for turn in range(len(trajectory.turns))]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    shape = TinyShape(hidden_size=8, intermediate_size=8, layers=1, heads=2, kv_heads=1, vocab_size=512)
    texts = ['What is 2 + 2? It is 4. {"name": "add", "parameters": {"a": 1}} many words and so on'] * 30
    make_tiny_model(path, texts=texts, seed=0, shape=shape)
    return path


@pytest.fixture(scope="module")
def evenings(checkpoint: Path) -> Any:
    """The :class:`Evening` of a template and a history, spent once."""

    @cache
    def spend(template: str, history: History) -> Evening:
        tokenizer = tokenizer_of(checkpoint, template)
        engine = Babbler(tokenizer, PARSERS[template])
        plans = [
            EpisodePlan(split="train", index=n, sibling=s, env_seed=n, seed=derive(1, template, n, s))
            for n in range(TASKS)
            for s in range(SIBLINGS)
        ]
        groups = asyncio.run(run(engine, Chats(tokenizer, history=history), plans))
        trajectories = [trajectory for group in groups for trajectory in group.trajectories]
        return Evening(history, engine.heard, list(zip(plans, trajectories, strict=True)))

    return spend


def tokenizer_of(checkpoint: Path, template: str) -> Any:
    tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint)
    added = [AddedToken(text, special=True, normalized=False) for text in ADDED[template]]
    tokenizer.add_tokens(added, special_tokens=True)
    tokenizer.chat_template = (TEMPLATES / f"{template}.jinja").read_text()
    if added:  # as Llama's and Gemma's tokenizers do
        begin = tokenizer.bos_token = ADDED[template][0]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, tokenizer.bos_token_id)]
        )
    return tokenizer


async def run(engine: Babbler, chats: Chats, plans: Sequence[EpisodePlan]) -> Any:
    limits = RolloutConfig(max_turn_tokens=TURN_TOKENS, max_episode_tokens=EPISODE_TOKENS, deadline_s=60)
    rollouts = Rollouts(Errands, chat=chats, engine=engine, limits=limits, in_flight=8)
    return await rollouts.groups(plans, sampling=Sampling(max_tokens=1, seed=0))


def expected_samples(requests: Sequence[tuple[IntArray, Completion]]) -> list[dict[str, list[Any]]]:
    """What the engine's own books say, without a look at the trajectory: one sample for each prompt that does
    not extend the one before."""
    samples: list[dict[str, list[Any]]] = []
    seen: list[int] = []
    for prompt_ids, completion in requests:
        prompt = prompt_ids.tolist()
        if not samples or prompt[: len(seen)] != seen:
            samples.append({"token_ids": [], "mask": [], "logprobs": [], "versions": []})
        row = samples[-1]
        given, said = prompt[len(row["token_ids"]) :], completion.token_ids.tolist()
        row["token_ids"] += given + said
        row["mask"] += [False] * len(given) + [True] * len(said)
        row["logprobs"] += [0.0] * len(given) + completion.logprobs.tolist()
        row["versions"] += [-1] * len(given) + completion.versions.tolist()
        seen = row["token_ids"]
    return samples


def columns(sample: Sample) -> dict[str, list[Any]]:
    return {name: getattr(sample, name).tolist() for name in ("token_ids", "mask", "logprobs", "versions")}


templates = pytest.mark.parametrize("template", list(PARSERS))
histories = pytest.mark.parametrize("history", ["append", "template"])


@templates
def test_the_template_chooses_the_format(template: str) -> None:
    assert detect_parser((TEMPLATES / f"{template}.jinja").read_text()) == PARSERS[template]


@templates
@histories
def test_every_prompt_is_the_one_before_with_what_was_said_and_what_is_new(
    evenings: Any, template: str, history: History
) -> None:
    evening = evenings(template, history)
    for plan, trajectory in evening.episodes:
        seen: list[int] = []
        for turn, (prompt_ids, completion) in enumerate(evening.requests(plan, trajectory)):
            kept = trajectory.turns[turn]
            prompt, said = prompt_ids.tolist(), completion.token_ids.tolist()
            assert trajectory.prompt_ids(turn).tolist() == prompt
            assert kept.completion.token_ids.tolist() == said
            assert kept.extends == (prompt[: len(seen)] == seen)
            assert kept.new_ids.tolist() == (prompt[len(seen) :] if kept.extends else prompt)
            assert kept.extends or history == "template"
            assert len(said) <= TURN_TOKENS
            assert len(prompt) + len(said) <= EPISODE_TOKENS
            seen = prompt + said


@templates
@histories
def test_every_sample_is_what_the_engine_saw_and_said(evenings: Any, template: str, history: History) -> None:
    evening = evenings(template, history)
    for plan, trajectory in evening.episodes:
        assert trajectory.valid
        samples = to_samples(trajectory)
        assert [columns(sample) for sample in samples] == expected_samples(evening.requests(plan, trajectory))
        assert sum(float(sample.rewards.sum()) for sample in samples) == pytest.approx(trajectory.reward)


@templates
@histories
def test_every_request_belongs_to_an_episode(evenings: Any, template: str, history: History) -> None:
    evening = evenings(template, history)
    assert len(evening.episodes) == TASKS * SIBLINGS
    assert len(evening.heard) == sum(len(trajectory.turns) for _, trajectory in evening.episodes)


@templates
def test_the_episodes_have_seen_it_all(evenings: Any, template: str) -> None:
    met: Counter[str] = Counter()
    for history in ("append", "template"):
        for _, trajectory in evenings(template, history).episodes:
            met[trajectory.stop_reason] += 1
            met["many turns"] += len(trajectory.turns) > 3
            met["tool error"] += trajectory.calls.get("error", 0)
            met["split"] += len(to_samples(trajectory)) > 1
            for message in trajectory.messages:
                met["parallel"] += len(message.tool_calls) > 1
                met["thought and call"] += message.content.startswith("<think>") and bool(message.tool_calls)
                met.update(call.status for call in message.tool_calls)
    stops = ("answered", "length", "context", "max_turns")
    statuses = ("ok", "unclosed", "unknown_tool", "schema_error")
    wanted = ("many turns", "tool error", "parallel", "thought and call", "split", *stops, *statuses)
    assert {name for name in wanted if not met[name]} == set()
