r"""Questions with a final answer, from GSM8K, MATH, MATH-500, or any rows with such columns.

The answer of a row is what follows ``####`` in its answer column, else the last ``\boxed{...}`` in it, else
all of it. ``content_hash`` is a hash of the question: equal questions have equal hashes, in whatever split
and order.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from agentrl.answers import boxed_answers
from agentrl.errors import BadConfig, BadData
from agentrl.rows import Files, Hub, Row, find_source, text_of

__all__ = ["Question", "Questions"]

_QUESTION_KEYS = ("question", "problem")  # tried in turn where no column is named
_ANSWER_KEYS = ("answer", "solution")
_CALCULATOR_NOTE = re.compile(r"<<[^<>\n]*>>")  # GSM8K's: 48/2 = <<48/2=24>>24
_PRESETS: Mapping[str, Hub] = {
    "gsm8k": Hub("openai/gsm8k", "main", {"train": "train", "test": "test"}),
    "math": Hub("DigitalLearningGmbH/MATH-lighteval", "default", {"train": "train", "test": "test"}),
    "math500": Hub("HuggingFaceH4/MATH-500", None, {"test": "test"}),
}


@dataclass(frozen=True, slots=True)
class Question:
    """One row."""

    text: str
    answer: str
    gold: str  # the worked solution with the answer in a box, or the box alone
    meta: Mapping[str, Any]  # level, subject, type as far as the row has them, and content_hash


class Questions:
    """A data set of questions. ``asked_by`` is the environment, for errors."""

    def __init__(
        self,
        dataset: str,
        *,
        question_key: str | None,
        answer_key: str | None,
        splits: Mapping[str, str] | None,
        limit: int | None,
        asked_by: str,
    ) -> None:
        if limit is not None and limit < 1:
            raise BadConfig(f"{asked_by}(limit={limit}): it must be at least 1, or None for all tasks")
        self._source: Files | Hub = find_source(dataset, presets=_PRESETS, splits=splits, asked_by=asked_by)
        self.splits = tuple(self._source.splits)
        self._question_keys = _QUESTION_KEYS if question_key is None else (question_key,)
        self._answer_keys = _ANSWER_KEYS if answer_key is None else (answer_key,)
        self._limit = limit

    def read(self, split: str) -> Iterator[Question]:
        """Each row of the split. Raises BadData for what can't be read, with its place, and for no rows."""
        count = 0
        for place, row in islice(self._source.rows(split), self._limit):
            yield self._question(row, place)
            count += 1
        if not count:
            raise BadData(
                f"the split {split!r} of {self._source.name} has no rows: give one JSON object per line"
            )

    def _question(self, row: Row, place: str) -> Question:
        named_by = "question_key and answer_key"
        question = text_of(row, self._question_keys, place, named_by=named_by)
        column = text_of(row, self._answer_keys, place, named_by=named_by)
        answer = _final_answer(column)
        if not answer:
            raise BadData(
                f"{place}: no answer in {column[-60:]!r}: it follows '####', stands in a box, or is all"
            )
        solution = row.get("solution") or (column if column != answer else "")
        meta = {name: row[name] for name in ("level", "subject", "type") if name in row}
        return Question(
            text=question,
            answer=answer,
            gold=_gold(str(solution), answer),
            meta={**meta, "content_hash": _content_hash(question)},
        )


def _final_answer(text: str) -> str:
    if "####" in text:
        return text.rpartition("####")[2].strip()
    return (boxed_answers(text) or (text,))[-1]


def _gold(solution: str, answer: str) -> str:
    worked = _CALCULATOR_NOTE.sub("", solution.partition("####")[0]).strip()
    if answer in boxed_answers(worked):
        return worked
    return f"{worked}\n\n\\boxed{{{answer}}}".strip()


def _content_hash(question: str) -> str:
    return hashlib.sha256(" ".join(question.split()).encode()).hexdigest()[:16]
