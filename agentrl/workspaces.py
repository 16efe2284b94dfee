"""Workspace tasks: a small repository, what is wrong with it, hidden tests and a repair; and their text form.

A text holds tasks, each begun by a line ``##### NAME SPLIT`` and made of sections: ``=== about``, then for
each file ``=== file PATH`` (there from the start), ``=== gold PATH`` (as the repair has it) and
``=== hidden PATH`` (a test that the policy never sees). Every function ``test_...`` of these must pass.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from agentrl.errors import BadConfig, BadData
from agentrl.sandbox import check_path

__all__ = ["WorkspaceTask", "parse_workspaces"]

_TASK = re.compile(r"^##### ([\w-]+) (\w+)$", re.M)
_SECTION = re.compile(r"^=== (about|file|gold|hidden)(?: (\S+))?$", re.M)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkspaceTask:
    """One repository."""

    name: str
    split: str
    about: str  # what is to be done, for the policy
    files: Mapping[str, str]  # by path
    gold: Mapping[str, str]  # the files that the repair changes
    hidden: Mapping[str, str] = field(repr=False)  # test files

    def test_names(self) -> dict[str, tuple[str, ...]]:
        """The test functions of each hidden file."""
        return {
            path: tuple(
                node.name
                for node in ast.parse(text).body
                if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
            )
            for path, text in self.hidden.items()
        }


def parse_workspaces(text: str, place: str) -> tuple[WorkspaceTask, ...]:
    """The tasks of a text. Raises BadData with ``place`` for what is no task."""
    pieces = _TASK.split(text)
    if pieces[0].strip() or len(pieces) < 4:
        raise BadData(f"{place}: it begins with '##### NAME SPLIT', and with nothing before")
    tasks = zip(pieces[1::3], pieces[2::3], pieces[3::3], strict=True)
    return tuple(_task(name, split, body=body, place=place) for name, split, body in tasks)


def _task(name: str, split: str, *, body: str, place: str) -> WorkspaceTask:
    pieces = _SECTION.split(body)
    found: dict[str, dict[str, str]] = {"about": {}, "file": {}, "gold": {}, "hidden": {}}
    for at in range(1, len(pieces), 3):
        kind, path, text = pieces[at : at + 3]
        try:
            found[kind][str(check_path(path)) if path else ""] = text.removeprefix("\n")
        except BadConfig as error:
            raise BadData(f"{place}: task {name!r}: {error}") from error
    lacking = [kind for kind, sections in found.items() if not sections]
    if lacking or pieces[0].strip() or not {*found["gold"]} <= {*found["file"]}:
        raise BadData(
            f"{place}: task {name!r} needs sections 'about', 'file', 'gold' and 'hidden', and gold of files "
            f"that are there; it lacks {', '.join(lacking) or 'one of these'}"
        )
    return WorkspaceTask(
        name=name,
        split=split,
        about=found["about"].get("", "").strip(),
        files=found["file"],
        gold=found["gold"],
        hidden=found["hidden"],
    )
