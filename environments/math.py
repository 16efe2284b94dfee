r"""Questions with a final answer: GSM8K, MATH, MATH-500, or any JSONL with such columns. One turn, no tools.

A data set is the name of a preset, a folder with one JSONL per split, a JSONL file, or a hub id. Rows are
read when a task is first asked for, and are then shared by all environments of equal settings. Only the hub
needs the ``datasets`` library and the network.

The answer of a row is what follows ``####`` in its answer column, else the last ``\boxed{...}`` in it, else
all of it. The gold episode is the worked solution where the row has one. ``meta["content_hash"]`` is a hash
of the question: equal questions have equal hashes, in whatever split and order.
"""

from __future__ import annotations

import hashlib
import json
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from agentrl.answers import boxed_answers
from agentrl.errors import BadConfig, BadData, MissingExtra, did_you_mean
from agentrl.tool_env import ToolEnv
from agentrl.types import Message, Task

__all__ = ["Math"]

Row = Mapping[str, Any]

_QUESTION_KEYS = ("question", "problem")  # tried in turn where no column is named
_ANSWER_KEYS = ("answer", "solution")
_BLANK = b" \t\r\n\xef\xbb\xbf"  # white space, and the mark that some editors put in front
_SURROGATE = re.compile("[\ud800-\udfff]")
_CALCULATOR_NOTE = re.compile(r"<<[^<>\n]*>>")  # GSM8K's: 48/2 = <<48/2=24>>24


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
        if limit is not None and limit < 1:
            raise BadConfig(f"Math(limit={limit}): it must be at least 1, or None for all tasks")
        self._source = _source(dataset, splits)
        self.splits = tuple(self._source.splits)  # type: ignore[misc]  # which they are depends on the data
        self._question_keys = _QUESTION_KEYS if question_key is None else (question_key,)
        self._answer_keys = _ANSWER_KEYS if answer_key is None else (answer_key,)
        self._limit = limit
        self._prompt = prompt
        super().__init__(**settings)

    def tasks(self, split: str) -> Sequence[Task]:
        """Every row of the split as a task. Raises BadData for what can't be read, with its place."""
        numbered = enumerate(islice(self._source.rows(split), self._limit))
        tasks = [self._task_of(row, place, f"{split}-{index}") for index, (place, row) in numbered]
        if not tasks:
            raise BadData(
                f"the split {split!r} of {self._source.name} has no rows: give one JSON object per line"
            )
        return tasks

    def gold(self, task: Task) -> tuple[Message, ...]:
        """The worked solution with the answer in a box, or the box alone."""
        return (Message("assistant", task.truth["gold"]),)

    def _task_of(self, row: Row, place: str, task_id: str) -> Task:
        question = _text(row, self._question_keys, place)
        column = _text(row, self._answer_keys, place)
        answer = _final_answer(column)
        if not answer:
            raise BadData(
                f"{place}: no answer in {column[-60:]!r}: it follows '####', stands in a box, or is all"
            )
        solution = row.get("solution") or (column if column != answer else "")
        meta = {name: row[name] for name in ("level", "subject", "type") if name in row}
        return Task(
            id=task_id,
            prompt=(Message("user", self._prompt.replace("{question}", question)),),
            truth={"answer": answer, "gold": _gold(str(solution), answer)},
            meta={**meta, "content_hash": _content_hash(question)},
        )


@dataclass(frozen=True, slots=True)
class _Files:
    """JSONL files, by split."""

    name: str
    splits: Mapping[str, Path]

    def rows(self, split: str) -> Iterator[tuple[str, Row]]:
        """Each row with its ``file:line``."""
        path = self.splits[split]
        try:
            with path.open("rb") as lines:
                for number, line in enumerate(lines, start=1):
                    if line.strip(_BLANK):
                        yield f"{path}:{number}", _parsed(line, f"{path}:{number}")
        except OSError as error:
            raise BadData(
                f"can't read {path}: {error.strerror}; give a file with one JSON object per line"
            ) from error


@dataclass(frozen=True, slots=True)
class _Hub:
    """A data set on the Hugging Face hub; its splits by ours."""

    name: str  # owner/name
    subset: str | None
    splits: Mapping[str, str]

    def rows(self, split: str) -> Iterator[tuple[str, Row]]:
        """Each row with its place. Loads the ``datasets`` library, and the data into its cache."""
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise MissingExtra(f"{self.name} is on the hub, which needs: pip install datasets") from error
        try:
            rows = load_dataset(self.name, self.subset, split=self.splits[split])
        except (OSError, ValueError) as error:  # not there, no network; no such split or subset
            raise BadData(
                f"can't load the split {self.splits[split]!r} of {self.name} from the hub: "
                f"{_in_short(error)}; check the id, 'owner/name' or 'owner/name:subset', or give a path"
            ) from error
        for index, row in enumerate(rows):
            yield f"{self.name}, {split} row {index}", row


_PRESETS: Mapping[str, _Hub] = {
    "gsm8k": _Hub("openai/gsm8k", "main", {"train": "train", "test": "test"}),
    "math": _Hub("DigitalLearningGmbH/MATH-lighteval", "default", {"train": "train", "test": "test"}),
    "math500": _Hub("HuggingFaceH4/MATH-500", None, {"test": "test"}),
}


def _source(dataset: str, splits: Mapping[str, str] | None) -> _Files | _Hub:
    if dataset in _PRESETS:
        preset = _PRESETS[dataset]
        return _Hub(preset.name, preset.subset, splits or preset.splits)
    path = Path(dataset).expanduser()
    if path.is_dir():
        return _Files(str(path), _folder_splits(path, splits))
    if path.is_file():
        if splits:
            raise BadConfig(f"Math(dataset={dataset!r}, splits=...): a file has no splits; give its folder")
        return _Files(str(path), {"test" if path.stem == "test" else "train": path})
    if re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", dataset) and not dataset.startswith((".", "~")):
        name, _, subset = dataset.partition(":")
        return _Hub(name, subset or None, splits or {"train": "train", "test": "test"})
    raise BadData(
        f"no data set {dataset!r}{did_you_mean(dataset, _PRESETS)}. It is no file and no folder, none of "
        f"{', '.join(_PRESETS)}, and no hub id 'owner/name'; check the path, seen from {Path.cwd()}"
    )


def _folder_splits(folder: Path, splits: Mapping[str, str] | None) -> Mapping[str, Path]:
    if splits:
        return {split: folder / name for split, name in splits.items()}
    found = {split: folder / f"{split}.jsonl" for split in ("train", "test")}
    found = {split: path for split, path in found.items() if path.is_file()}
    if not found:
        raise BadData(
            f"the folder {folder} has neither train.jsonl nor test.jsonl: "
            "name its files with splits={'train': 'some.jsonl'}"
        )
    return found


def _parsed(line: bytes, place: str) -> Row:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadData(
            f"{place}: not UTF-8 ({error.reason}, byte {error.start + 1}); save it as UTF-8"
        ) from error
    except json.JSONDecodeError as error:
        raise BadData(
            f"{place}: not JSON ({error.msg}, column {error.colno}); mend or remove the line"
        ) from error
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, brackets a thousand deep
        raise BadData(f"{place}: JSON that can't be read ({error}); mend or remove the line") from error
    if not isinstance(row, dict):
        raise BadData(
            f"{place}: a {type(row).__name__}, not a JSON object; give each row its columns by name"
        )
    return row


def _in_short(error: Exception) -> str:
    return textwrap.shorten(str(error), 300, placeholder="...").rstrip(".")


def _text(row: Row, keys: Sequence[str], place: str) -> str:
    for key in keys:
        value = row.get(key)
        if isinstance(value, (str, int, float)) and not isinstance(value, bool) and str(value).strip():
            text = str(value).strip()
            if _SURROGATE.search(text):
                raise BadData(
                    f"{place}: half of a surrogate pair, \\ud800 to \\udfff, in the column {key!r}, which no "
                    "text can have; mend or remove the line"
                )
            return text
    wanted, there = " or ".join(map(repr, keys)), ", ".join(map(repr, row)) or "none"
    raise BadData(
        f"{place}: no text in the column {wanted}; the columns are {there}: "
        "name yours with question_key and answer_key"
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
