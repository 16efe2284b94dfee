"""Workspace tasks: a small repository, what is wrong with it, hidden tests and a repair; and their text form.

A text holds tasks, each begun by a line ``##### NAME SPLIT`` and made of sections: ``=== about``, then for
each file ``=== file PATH`` (there from the start), ``=== gold PATH`` (as the repair has it) and
``=== hidden PATH`` (Python that the policy never sees). No other line may begin with ``=== `` or ``##### ``.

What pytest collects from the hidden files by its defaults must pass: functions ``test...``, methods
``test...`` of classes ``Test...`` and of unittest's cases. What would be judged wrongly or left out unseen is
refused: coroutines outside of unittest's IsolatedAsyncioTestCase, parametrized tests, tests inside of other
statements, classes whose bases lie elsewhere.
"""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import NoReturn

from agentrl.errors import BadConfig, BadData
from agentrl.sandbox import check_path

__all__ = ["MOST_WRITTEN", "WorkspaceTask", "parse_workspaces"]

MOST_WRITTEN = 1 << 18  # bytes of a file that the policy writes, so of a repair's file, too

_MARK = re.compile(r"(?:===|#####)[ \t]")  # what no line of a file begins with
_TASK = re.compile(r"##### ([\w.-]+) (\w+)")
_SECTION = re.compile(r"=== (?:(about)|(file|gold|hidden) (\S+))")
_ALLOWED = (
    "write '##### NAME SPLIT' (NAME of letters, digits, '_', '.', '-'), '=== about', '=== file PATH', "
    "'=== gold PATH' or '=== hidden PATH' (PATH without blanks); no line of a file can begin with '=== ' or "
    "'##### '"
)
_CASES = frozenset({"TestCase", "IsolatedAsyncioTestCase"})  # unittest's


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
        """The tests of each hidden file, such as ``test_a`` and ``TestB::test_c``. Raises BadData."""
        return {path: _HiddenFile(path, text).names() for path, text in self.hidden.items()}


@dataclass(frozen=True, slots=True)
class _Section:
    kind: str
    path: str  # "" of an about
    line: int  # of the text, from 1
    body: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Draft:
    """A task as its lines have it."""

    name: str
    split: str
    line: int
    sections: list[_Section] = field(default_factory=list)


def parse_workspaces(text: str, place: str) -> tuple[WorkspaceTask, ...]:
    """The tasks of a text. Raises BadData with ``place`` and what stands there for what is no task."""
    drafts = _drafts(text, place)
    lines: dict[str, int] = {}
    for draft in drafts:
        if lines.setdefault(draft.name, draft.line) != draft.line:
            raise BadData(
                f"{place}, line {draft.line}: a second task {draft.name!r}, after that of line "
                f"{lines[draft.name]}: give each task a name of its own"
            )
    return tuple(_task(draft, place) for draft in drafts)


def _drafts(text: str, place: str) -> list[_Draft]:
    drafts: list[_Draft] = []
    for number, line in enumerate(re.split(r"(?<=\n)", text), 1):
        where, shown = f"{place}, line {number}", f"{line.strip()[:100]!r}"
        if _MARK.match(line) and (task := _TASK.fullmatch(line.rstrip())):
            drafts.append(_Draft(task[1], task[2], number))
        elif not drafts and line.strip():
            raise BadData(f"{where}: it begins with '##### NAME SPLIT', and with nothing before, not {shown}")
        elif _MARK.match(line) and (section := _SECTION.fullmatch(line.rstrip())):
            drafts[-1].sections.append(_Section(section[1] or section[2], section[3] or "", number))
        elif _MARK.match(line):
            raise BadData(f"{where}: {shown} begins no task and no section: {_ALLOWED}")
        elif drafts and drafts[-1].sections:
            drafts[-1].sections[-1].body.append(line)
        elif line.strip():
            raise BadData(f"{where}: {shown} stands in no section: write '=== about' before it")
    if not drafts:
        raise BadData(f"{place}: it is empty; it begins with '##### NAME SPLIT', and with nothing before")
    return drafts


def _task(draft: _Draft, place: str) -> WorkspaceTask:
    found: dict[str, dict[str, str]] = {"about": {}, "file": {}, "gold": {}, "hidden": {}}
    for section in draft.sections:
        where, texts = f"{place}, line {section.line}: task {draft.name!r}", found[section.kind]
        if section.path in texts:
            shown = f"=== {section.kind} {section.path}".rstrip()
            raise BadData(f"{where} has {shown!r} twice: it is there once; leave one out")
        try:
            if section.kind != "about":
                check_path(section.path)
        except BadConfig as error:
            raise BadData(f"{where}: {error}") from error
        texts[section.path] = "".join(section.body)
    where = f"{place}, line {draft.line}: task {draft.name!r}"
    if lacking := [kind for kind, sections in found.items() if not sections]:
        raise BadData(
            f"{where} needs sections 'about', 'file', 'gold' and 'hidden'; it lacks {', '.join(lacking)}"
        )
    task = WorkspaceTask(
        name=draft.name,
        split=draft.split,
        about=found["about"][""].strip(),
        files=found["file"],
        gold=found["gold"],
        hidden=found["hidden"],
    )
    try:
        _check(task)
    except BadData as error:
        raise BadData(f"{where}: {error}") from error
    return task


def _check(task: WorkspaceTask) -> None:
    """Raises BadData for what can't be written, repaired or judged."""
    paths = {*task.files, *task.hidden}
    for path in sorted(paths):
        if above := [str(folder) for folder in PurePosixPath(path).parents if str(folder) in paths]:
            raise BadData(f"{path!r} lies in {above[0]!r}, which is a file: rename one of them")
    for path, text in task.gold.items():
        if path not in task.files:
            raise BadData(
                f"'=== gold {path}' is of no file that is there: only those are judged; write '=== file "
                f"{path}', or name one of {', '.join(task.files)}"
            )
        if (size := len(text.encode())) > MOST_WRITTEN:
            raise BadData(
                f"'=== gold {path}' has {size} bytes, and a tool writes at most {MOST_WRITTEN}: repair "
                "a smaller file"
            )
        if path.endswith(".py"):
            _parsed(text, f"'=== gold {path}'")
    if all(task.files[path] == text for path, text in task.gold.items()):
        raise BadData("its gold is what its files are already: write the repair there")
    if not any(task.test_names().values()):
        raise BadData(
            f"there is no test in {', '.join(task.hidden)}: write functions 'test_...', or methods of "
            "classes 'Test...' or of unittest's TestCase"
        )


def _parsed(text: str, what: str) -> ast.Module:
    try:
        return ast.parse(text)
    except SyntaxError as error:
        raise BadData(f"{what}, its line {error.lineno}: no Python, {error.msg}: repair it") from error
    except ValueError as error:  # a NUL
        raise BadData(f"{what} is no Python, {error}: repair it") from error


_Function = ast.FunctionDef | ast.AsyncFunctionDef


class _HiddenFile:
    """The tests of a hidden file, read from its source. Raises BadData for what can't be judged."""

    def __init__(self, path: str, text: str) -> None:
        self._path, self._tree = path, _parsed(text, f"'=== hidden {path}'")
        self._classes = {node.name: node for node in self._tree.body if isinstance(node, ast.ClassDef)}
        self._bases = {
            ast.unparse(base)
            for node in ast.walk(self._tree)
            if isinstance(node, ast.ClassDef)
            for base in node.bases
        }

    def names(self) -> tuple[str, ...]:
        """Each as it stands in a node id, in the file's order."""
        lines: dict[str, int] = {}
        for name, node in self._tests():
            if name in lines:
                self._refuse(node, f"stands there twice, first in line {lines[name]}: rename one")
            lines[name] = node.lineno
        return tuple(sorted(lines, key=lambda name: lines[name]))

    def _tests(self) -> Iterator[tuple[str, _Function]]:
        for function in self._functions(self._tree.body):
            self._check(function, is_async=False)
            yield function.name, function
        for node in self._tree.body:
            if isinstance(node, ast.ClassDef):
                yield from self._class(node)

    def _class(self, node: ast.ClassDef) -> Iterator[tuple[str, _Function]]:
        """Its tests, the inherited and those of classes in it included."""
        lineage, foreign = self._lineage(node)
        cases, foreign = foreign & _CASES, foreign - _CASES
        tests = self._methods(lineage)
        if not (cases or node.name.startswith("Test")):
            if tests and node.name not in self._bases:
                self._refuse(node, "has tests, but not the name of a class of tests: call it 'Test...'")
            return
        if any(ast.unparse(statement) == "__test__ = False" for statement in node.body):
            return
        if foreign:
            bases = ", ".join(sorted(foreign))
            self._refuse(node, f"may inherit tests of {bases}, from elsewhere: write them here, or rename it")
        if tests and not cases and _makes_itself(lineage):
            self._refuse(node, "has tests and an __init__, so that pytest passes over it: use setup_method")
        for test in tests:
            self._check(test, is_async="IsolatedAsyncioTestCase" in cases)
            yield f"{node.name}::{test.name}", test
        for inner in node.body:
            if isinstance(inner, ast.ClassDef) and not cases:
                yield from ((f"{node.name}::{name}", test) for name, test in self._class(inner))

    def _lineage(self, node: ast.ClassDef) -> tuple[list[ast.ClassDef], set[str]]:
        """A class and those that it derives from in this file; the last names of what lies elsewhere."""
        lineage, foreign = [node], set()
        for base in node.bases:
            name = ast.unparse(base)
            known = self._classes.get(name)
            if known is not None and known.lineno < node.lineno:
                inner, beyond = self._lineage(known)
                lineage += [one for one in inner if one not in lineage]
                foreign |= beyond
            elif not isinstance(getattr(builtins, name, None), type):
                foreign.add(name.rpartition(".")[2])
        return lineage, foreign

    def _methods(self, lineage: Sequence[ast.ClassDef]) -> list[_Function]:
        """The tests of a class and, unless it has its own of that name, of what it derives from."""
        found: list[_Function] = []
        for node in lineage:
            known = {test.name for test in found}
            found += [test for test in self._functions(node.body) if test.name not in known]
        return found

    def _functions(self, body: Sequence[ast.stmt]) -> list[_Function]:
        """The tests that stand in ``body`` itself."""
        for node in body:
            if not isinstance(node, _Function | ast.ClassDef):
                for inner in ast.walk(node):
                    if isinstance(inner, _Function) and _is_test(inner):
                        self._refuse(inner, "stands inside of another statement: write it outside")
        return [node for node in body if isinstance(node, _Function) and _is_test(node)]

    def _check(self, node: _Function, *, is_async: bool) -> None:
        if isinstance(node, ast.AsyncFunctionDef) and not is_async:
            self._refuse(
                node,
                "is a coroutine, which nothing would run: call asyncio.run in a plain test, or derive its "
                "class from unittest.IsolatedAsyncioTestCase",
            )
        if _has_decorator(node, "parametrize"):
            self._refuse(node, "is parametrized, and each test is judged as one: write a loop")

    def _refuse(self, node: _Function | ast.ClassDef, why: str) -> NoReturn:
        raise BadData(f"'=== hidden {self._path}', its line {node.lineno}: {node.name} {why}")


def _is_test(node: _Function) -> bool:
    return node.name.startswith("test") and not _has_decorator(node, "fixture")


def _has_decorator(node: _Function, name: str) -> bool:
    named = (ast.unparse(getattr(decorator, "func", decorator)) for decorator in node.decorator_list)
    return any(one.rpartition(".")[2] == name for one in named)


def _makes_itself(lineage: Sequence[ast.ClassDef]) -> bool:
    return any(getattr(one, "name", "") in ("__init__", "__new__") for node in lineage for one in node.body)
