"""Rows of a data set: a JSON or JSONL file, plain or gzipped, a folder with one per split, or the hub.

Whatever can't be read is BadData that names its place. Files are read when rows are first asked for; only the
hub needs the ``datasets`` library and the network.
"""

from __future__ import annotations

import gzip
import json
import re
import textwrap
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from agentrl.errors import BadConfig, BadData, MissingExtra, did_you_mean
from agentrl.sandboxing.private import keep_private

__all__ = ["Files", "Hub", "Row", "Source", "find_source", "text_of", "whole_text"]

Row = Mapping[str, Any]

_BLANK = b" \t\r\n\xef\xbb\xbf"  # white space, and the mark that some editors put in front
_SUFFIXES = (".json", ".jsonl", ".gz")  # of files, and of no data set on the hub
_SURROGATE = re.compile("[\ud800-\udfff]")


class Source(Protocol):
    """Where rows come from."""

    @property
    def name(self) -> str:
        """What an error calls it."""
        ...

    @property
    def splits(self) -> Mapping[str, Any]:
        """Its splits, by their names here."""
        ...

    def rows(self, split: str) -> Iterator[tuple[str, Row]]:
        """Each row of a split with its place. Raises BadData."""
        ...


@dataclass(frozen=True, slots=True)
class Files:
    """JSON files, by split."""

    name: str
    splits: Mapping[str, Path]

    def __post_init__(self) -> None:
        keep_private(*(path.parent for path in self.splits.values()))

    def rows(self, split: str) -> Iterator[tuple[str, Row]]:
        """Each row with its ``file:line``; of a ``.json`` file, which holds one list, with its position."""
        path = self.splits[split]
        try:
            if path.suffix == ".json":
                yield from _listed(path)
                return
            with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
                for number, line in enumerate(lines, start=1):
                    if line.strip(_BLANK):
                        yield (
                            f"{path}:{number}",
                            _object(_parsed(line, f"{path}:{number}"), f"{path}:{number}"),
                        )
        except (OSError, EOFError, zlib.error) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise BadData(
                f"can't read {path}: {reason}; give a file with one JSON object per line"
            ) from error


@dataclass(frozen=True, slots=True)
class Hub:
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


def find_source(
    dataset: str, *, presets: Mapping[str, Hub], splits: Mapping[str, str] | None, asked_by: str
) -> Files | Hub:
    """The data set of this name: a preset, a folder, a file, or a hub id.

    ``splits``: the file in the folder, or the split on the hub, for each split; None: train and test as far
    as they are there. ``asked_by``: the environment, for errors. Raises BadData where it is nowhere.
    """
    if dataset in presets:
        preset = presets[dataset]
        return Hub(preset.name, preset.subset, splits or preset.splits)
    path = Path(dataset).expanduser()
    if path.is_dir():
        return Files(str(path), _folder_splits(path, splits))
    if path.is_file():
        if splits:
            raise BadConfig(
                f"{asked_by}(dataset={dataset!r}, splits=...): a file has no splits; give its folder"
            )
        return Files(str(path), {"test" if path.name.partition(".")[0] == "test" else "train": path})
    if path.suffix in _SUFFIXES:
        raise BadData(f"no such file: {dataset}; check the path, seen from {Path.cwd()}")
    if re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", dataset) and not dataset.startswith((".", "~")):
        name, _, subset = dataset.partition(":")
        return Hub(name, subset or None, splits or {"train": "train", "test": "test"})
    raise BadData(
        f"no data set {dataset!r}{did_you_mean(dataset, presets)}. It is no file and no folder, none of "
        f"{', '.join(presets)}, and no hub id 'owner/name'; check the path, seen from {Path.cwd()}"
    )


def text_of(row: Row, keys: Sequence[str], place: str, *, named_by: str) -> str:
    """The first text in one of the columns ``keys``, stripped.

    Raises BadData, with ``named_by`` as what names columns, where there is none.
    """
    for key in keys:
        value = row.get(key)
        if isinstance(value, (str, int, float)) and not isinstance(value, bool) and str(value).strip():
            return whole_text(str(value).strip(), f"{place}: {key}")
    wanted, there = " or ".join(map(repr, keys)), ", ".join(map(repr, row)) or "none"
    raise BadData(
        f"{place}: no text in the column {wanted}; the columns are {there}: name yours with {named_by}"
    )


def whole_text(text: str, what: str) -> str:
    """``text``, which ``what`` names. Raises BadData where half of a surrogate pair is in it."""
    if half := _SURROGATE.search(text):
        around = ascii(text[max(half.start() - 30, 0) : half.end() + 30])
        raise BadData(
            f"{what}={around}: half of a surrogate pair, \\ud800 to \\udfff, which no text can have; "
            "mend or remove the row"
        )
    return text


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


def _listed(path: Path) -> Iterator[tuple[str, Row]]:
    rows = _parsed(path.read_bytes(), str(path))
    if not isinstance(rows, list):
        raise BadData(f"{path}: a {type(rows).__name__}; a .json file holds one list of objects")
    for index, row in enumerate(rows):
        yield f"{path}[{index}]", _object(row, f"{path}[{index}]")


def _parsed(data: bytes, place: str) -> Any:
    try:
        return json.loads(data.decode("utf-8-sig"))
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


def _object(row: Any, place: str) -> Row:
    if not isinstance(row, dict):
        raise BadData(
            f"{place}: a {type(row).__name__}, not a JSON object; give each row its columns by name"
        )
    return row


def _in_short(error: Exception) -> str:
    return textwrap.shorten(str(error), 300, placeholder="...").rstrip(".")
