r"""Questions with a final answer: GSM8K, MATH, MATH-500, or any JSONL with such columns. One turn, no tools.

A data set is the name of a preset, a folder with one JSONL per split, a JSONL file, or a hub id. Rows are
read when a task is first asked for, and are then shared by all environments of equal settings. Only the hub
needs the ``datasets`` library and the network.

The answer of a row is what follows ``####`` in its answer column, else the last ``\boxed{...}`` in it, else
all of it. The gold episode is the worked solution where the row has one. ``meta["content_hash"]`` is a hash
of the question: equal questions have equal hashes, in whatever split and order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from agentrl.errors import BadConfig
from agentrl.questions import Questions
from agentrl.tool_env import ToolEnv
from agentrl.types import Message, Task

__all__ = ["Math"]


class Math(ToolEnv):
    r"""Answer a question in ``\boxed{}``."""

    reward = "boxed"
    max_turns = 1

    def __init__(
        self,
        *,
        dataset: str = "gsm8k",
        question_key: str | None = None,
        answer_key: str | None = None,
        splits: Mapping[str, str] | None = None,
        limit: int | None = None,
        prompt: str = "{question}\n\nReason step by step, and put the final answer in \\boxed{}.",
        **settings: Any,
    ) -> None:
        """``dataset`` is "gsm8k", "math", "math500", a path, or a hub id ("owner/name", "owner/name:subset").

        ``splits``: the file in the folder, or the split on the hub, for each split of this environment; by
        default train and test, as far as they are there. A single file is the split that it is named after,
        else train. ``limit``: at most this many tasks of each split, the first ones. ``prompt``: with
        ``{question}`` in it.
        """
        if "{question}" not in prompt:
            raise BadConfig(f"Math(prompt={prompt!r}): it must contain {{question}}, where the question goes")
        self._questions = Questions(
            dataset,
            question_key=question_key,
            answer_key=answer_key,
            splits=splits,
            limit=limit,
            asked_by="Math",
        )
        self.splits = self._questions.splits  # type: ignore[misc]  # which they are depends on the data
        self._prompt = prompt
        super().__init__(**settings)

    def tasks(self, split: str) -> Sequence[Task]:
        """Every row of the split as a task. Raises BadData for what can't be read, with its place."""
        return [
            Task(
                id=f"{split}-{index}",
                prompt=(Message("user", self._prompt.replace("{question}", question.text)),),
                truth={"answer": question.answer, "gold": question.gold},
                meta=question.meta,
            )
            for index, question in enumerate(self._questions.read(split))
        ]

    def gold(self, task: Task) -> tuple[Message, ...]:
        """The worked solution with the answer in a box, or the box alone."""
        return (Message("assistant", task.truth["gold"]),)
