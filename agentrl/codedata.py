"""Programming tasks from rows: the bundled suite's, HumanEval's, MBPP's, their + versions', and anybody's.

Which of these a row is, its columns tell; a row of one's own has columns that are named. Nothing of a data
set is run in this process. A test's text goes into the judge's sandbox; expected values of the + versions are
what their reference gives in a sandbox (``agentrl.evalplus``), when a task is first asked for.
"""

from __future__ import annotations

import ast
import hashlib
import keyword
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from agentrl.codetests import checked_text, parsed, read_test
from agentrl.errors import BadConfig, BadData
from agentrl.judge import AssertTest, CallTest, IOTest, Problem, Test
from agentrl.rows import Row, text_of

__all__ = ["COLUMNS", "CodeTask", "Draft", "content_hash", "draft_of", "from_bundled"]

# What a row of one's own may have, under these names or others that are given for them.
COLUMNS = ("statement", "tests", "solution", "entry_point", "setup", "id")
_COMPLETE = "Complete this function, and repeat it whole in your answer:\n```python\n{}\n```"
_MATCHES = (737, 787, 794)  # of MBPP: the reference returns a match object, which no pipe carries
_NAMED_BY = f"columns={{...}}, which takes {', '.join(COLUMNS)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeTask:
    """A programming task, whatever it was read from."""

    id: str  # the data set's own
    statement: str  # for the policy
    problem: Problem
    solution: str  # a program that passes; "" where the row has none
    meta: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A task of which all but the problem is known; ``problem`` makes it, for + rows in a sandbox."""

    id: str
    statement: str
    solution: str
    problem: Callable[[], Problem]
    meta: Mapping[str, Any]
    place: str = ""  # of its row, for errors
    has_own_id: bool = True  # False: the id is a hash of the statement
    has_visible: bool = False  # whether the policy may see a test

    def task(self) -> CodeTask:
        """The whole. Raises BadData, and SandboxLost where a reference could not be run."""
        return CodeTask(
            id=self.id,
            statement=self.statement,
            solution=self.solution,
            problem=self.problem(),
            meta=self.meta,
        )


def draft_of(
    row: Row,
    place: str,
    *,
    columns: Mapping[str, str],
    visible: int | None,
    expected: Callable[[Row, str], Problem],
) -> Draft:
    """The task of a row.

    ``visible``: how many of its tests, the first ones, the policy may see where the row does not say; None:
    of MBPP one, which names the function, else none. ``expected`` makes the problem of a + row.
    Raises BadData with ``place``, and BadConfig for ``visible`` where no test can be shown.
    """
    try:
        draft = _draft(row, place, columns=columns, visible=visible, expected=expected)
    except BadData as error:
        if str(error).startswith(place):
            raise
        raise BadData(f"{place}: {error}") from error
    except (SyntaxError, UnicodeError, RecursionError, MemoryError) as error:
        why = error.msg if isinstance(error, SyntaxError) else str(error) or "nested too deep"
        raise BadData(f"{place}: Python that can't be parsed: {why}; mend or remove the row") from error
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise BadData(
            f"{place}: {type(error).__name__}: {error}; a column lacks, or has another type"
        ) from error
    for name in ("id", "statement", "solution"):
        checked_text(getattr(draft, name), f"{place}: {name}")
    return replace(draft, place=place)


def _draft(
    row: Row,
    place: str,
    *,
    columns: Mapping[str, str],
    visible: int | None,
    expected: Callable[[Row, str], Problem],
) -> Draft:
    """The draft of whichever form the row has."""
    if columns:
        return _own(row, place, columns=columns, visible=visible or 0)
    is_humaneval = {"prompt", "entry_point", "canonical_solution", "test"} <= row.keys()
    if visible and ("plus_input" in row or is_humaneval):
        raise BadConfig(
            f"{place}: visible={visible} has no effect on a row of HumanEval or of a + version, whose tests "
            "are all hidden: leave it out, and for several turns take feedback='verdict'"
        )
    if "plus_input" in row:
        return _plus(row, place, expected=expected)
    if is_humaneval:
        return _humaneval(row, place)
    if "test_list" in row:
        return _mbpp(row, place, visible=1 if visible is None else visible)
    if row.get("kind") in ("call", "stdin") and "tests" in row:
        return from_bundled(row, place)
    return _own(row, place, columns=columns, visible=visible or 0)


def content_hash(statement: str) -> str:
    """Of a task's text: equal texts, white space aside, have equal hashes."""
    return hashlib.sha256(" ".join(statement.split()).encode()).hexdigest()[:16]


def from_bundled(row: Row, place: str) -> Draft:
    """A row of the bundled suite's form. Raises BadData with ``place``."""
    is_call = row["kind"] == "call"
    tests = tuple(read_test(test, number, place, visible=False) for number, test in enumerate(row["tests"]))
    task = Problem(tests=tests, entry_point=row.get("entry_point", "") if is_call else "")
    examples = [_example(test, task.entry_point) for test in tests if test.visible]
    signature = f"```python\n{row['signature']}\n```\n\n" if is_call and row.get("signature") else ""
    how = "" if is_call else "Read from standard input and print to standard output.\n\n"
    statement = f"{row['statement'].strip()}\n\n{signature}{how}" + _listed(examples)
    return Draft(
        id=row["id"],
        statement=statement.strip(),
        solution=row.get("solution") or "",
        problem=lambda: task,
        meta={name: row[name] for name in ("level", "topics", "title") if name in row},
        has_visible=bool(examples),
    )


def _example(test: Test, name: str) -> str:
    if isinstance(test, CallTest):
        return f"{name}({', '.join(map(repr, test.args))}) == {test.expected!r}"
    if isinstance(test, AssertTest):
        return test.code
    return f"Input:\n{test.stdin.rstrip()}\nOutput:\n{test.stdout.rstrip()}"


def _listed(examples: Sequence[str]) -> str:
    return "For example:\n```\n" + "\n".join(examples) + "\n```" if examples else ""


# -- HumanEval --


def _humaneval(row: Row, place: str) -> Draft:
    prompt = row["prompt"]
    problem = Problem(
        tests=_checks(row["test"]), entry_point=row["entry_point"], setup=_before(prompt, row["entry_point"])
    )
    return Draft(
        id=row["task_id"],
        statement=_COMPLETE.format(prompt.strip()),
        solution=prompt + row["canonical_solution"],
        problem=lambda: problem,
        meta={},
    )


def _before(prompt: str, entry_point: str) -> str:
    """What stands around the function that a prompt leaves open: imports and helpers."""
    body = [
        node
        for node in ast.parse(prompt).body
        if not (isinstance(node, ast.FunctionDef) and node.name == entry_point)
    ]
    return "\n\n".join(map(ast.unparse, body))


def _checks(source: str) -> tuple[AssertTest, ...]:
    """One test for each assertion of ``check(candidate)``, where none depends on another; else one for all.

    An assertion that does not call the candidate is none. Statements that may only prepare are imports.
    """
    source = _without_numpy(source)
    tree = ast.parse(source)
    (check,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "check")
    imports = [node for node in check.body if isinstance(node, ast.Import | ast.ImportFrom)]
    tested = [
        node for node in check.body if isinstance(node, ast.Assert | ast.For) and "candidate" in _names(node)
    ]
    harmless = (ast.Import, ast.ImportFrom, ast.Assert, ast.For, ast.Expr)
    if not tested or not all(isinstance(node, harmless) for node in check.body):
        return (AssertTest(id="check", code=f"{source}\n\ncheck(candidate)\n"),)
    around = [node for node in tree.body if node is not check and not _is_metadata(node)]
    before = "".join(f"{ast.unparse(node)}\n" for node in (*around, *imports))
    return tuple(
        AssertTest(id=f"check-{number}", code=before + ast.unparse(node))
        for number, node in enumerate(tested)
    )


# What EvalPlus's own tests on the hub need of numpy; sandboxes have the standard library alone.
_NUMPY = """
class np:
    class ndarray: pass
    float32 = float64 = float
    def allclose(got, wanted, rtol=1e-05, atol=1e-08):
        if isinstance(wanted, (list, tuple)):
            pairs = zip(got, wanted)
            return len(got) == len(wanted) and all(np.allclose(*pair, rtol, atol) for pair in pairs)
        return got == wanted or abs(got - wanted) <= atol + rtol * abs(wanted) < float("inf")
"""
_IMPORTS_NUMPY = re.compile(r"^import numpy as np[ \t]*$", re.M)
_USES_NUMPY = re.compile(r"\bnp\.(\w+)")


def _without_numpy(source: str) -> str:
    """A test's text without an import of numpy that four of its names can stand for."""
    is_enough = {*_USES_NUMPY.findall(source)} <= {"allclose", "float32", "float64", "ndarray"}
    return _IMPORTS_NUMPY.sub(_NUMPY.strip(), source, count=1) if is_enough else source


def _is_metadata(node: ast.stmt) -> bool:
    return isinstance(node, ast.Assign) and "METADATA" in _names(node)


def _names(node: ast.AST) -> set[str]:
    return {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}


# -- MBPP --


def _mbpp(row: Row, place: str, *, visible: int) -> Draft:
    solution = row["code"].replace("\r\n", "\n")
    tree = ast.parse(solution)
    defined = _defined(tree)
    used = [_called(ast.parse(test)) for test in row["test_list"]]
    entry_point = next((name for name in used[0] if name in defined), "")
    if not entry_point:
        raise BadData(f"{place}: the first assertion calls no function of the solution")
    imports = [ast.unparse(node) for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    setup = "\n".join(dict.fromkeys(row.get("test_imports", ())))
    # What the reference imports, tests may use; a program that needs it imports it itself.
    given = "\n".join([*imports, row.get("test_setup_code", "").replace("\r\n", "\n")])
    # Objects of the solution's own classes can't be sent away: such tests run beside it.
    needed = {
        *_names(ast.parse(given)),
        *(name for test in row["test_list"] for name in _names(ast.parse(test))),
    }
    shared = bool(needed & defined - {entry_point}) or row["task_id"] in _MATCHES
    tests = tuple(
        AssertTest(
            id=f"test-{number}",
            code=f"{given}\n{test}".strip(),
            visible=number < visible,
            trust="shared" if shared else "remote",
        )
        for number, test in enumerate(row["test_list"])
    )
    if "test" in row:  # MBPP+ as it is on the hub
        plus = _without_numpy("\n".join([*imports, row["test"]]))
        tests += (AssertTest(id="plus", code=plus, trust="shared" if shared else "remote"),)
    problem = Problem(tests=tests, entry_point=entry_point, setup=setup)
    text = str(row.get("prompt") or row["text"]).strip()
    named = [*row["test_list"][:visible]] or [f"The function's name is {entry_point}."]
    return Draft(
        id=f"Mbpp/{row['task_id']}",
        statement=f"{text}\n\n{_listed(named) if visible else named[0]}",
        solution=solution,
        problem=lambda: problem,
        meta={},
        has_visible=visible > 0,
    )


def _defined(tree: ast.Module) -> set[str]:
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def _called(tree: ast.Module) -> list[str]:
    calls = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    return [function.id for function in calls if isinstance(function, ast.Name)]


# -- HumanEval+ and MBPP+ --


def _plus(row: Row, place: str, *, expected: Callable[[Row, str], Problem]) -> Draft:
    prompt, entry_point = row["prompt"], row["entry_point"]
    if "assertion" in row:  # MBPP+: the prompt is a docstring with one assertion
        statement = str(ast.literal_eval(prompt.strip())).strip()
        solution = row["canonical_solution"]
    else:
        statement = _COMPLETE.format(prompt.strip())
        solution = prompt + row["canonical_solution"]
    return Draft(
        id=row["task_id"],
        statement=statement,
        solution=solution,
        problem=lambda: expected({**row, "solution": solution, "entry_point": entry_point}, place),
        meta={},
    )


# -- rows of one's own --


def _own(row: Row, place: str, *, columns: Mapping[str, str], visible: int) -> Draft:
    keys = {name: columns.get(name, name) for name in COLUMNS}
    statement = text_of(row, [keys["statement"]], place, named_by=_NAMED_BY)
    given = row.get(keys["tests"])
    if not isinstance(given, list) or not given:
        raise BadData(
            f"{place}: no list of tests in the column {keys['tests']!r}; name yours with {_NAMED_BY}"
        )
    entry_point, solution, setup = (
        _text_or_none(row, keys[name], place) for name in ("entry_point", "solution", "setup")
    )
    if keyword.iskeyword(entry_point):
        raise BadData(f"{place}: {keys['entry_point']}={entry_point!r}: a word of Python names no function")
    tests = tuple(
        read_test(test, number, place, visible=number < visible) for number, test in enumerate(given)
    )
    if not entry_point and not all(isinstance(test, IOTest) for test in tests):
        entry_point = _guessed(solution, tests, place, column=keys["entry_point"])
    problem = Problem(tests=tests, entry_point=entry_point, setup=setup)
    examples = [_example(test, entry_point) for test in tests if test.visible]
    own_id = _own_id(row, keys["id"], place)
    return Draft(
        id=own_id or f"row-{content_hash(statement)}",
        statement=f"{statement}\n\n{_listed(examples)}".strip(),
        solution=solution,
        problem=lambda: problem,
        meta={},
        has_own_id=bool(own_id),
        has_visible=bool(examples),
    )


def _text_or_none(row: Row, key: str, place: str) -> str:
    """The text in a column that may be empty: then "". Raises BadData for what is no text."""
    value = row.get(key)
    how = "; put its lines into one text, or name another column with columns={...}"
    return "" if value is None else checked_text(value, f"{place}: {key}", or_else=how)


def _own_id(row: Row, key: str, place: str) -> str:
    """A row's id as a text; "" where it has none."""
    value = row.get(key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, str | int | float)):
        raise BadData(
            f"{place}: {key}={str(value)[:80]!r}: an id is a text or a number; "
            "without one it is made of the statement"
        )
    return "" if value is None else str(value)


def _guessed(solution: str, tests: Sequence[Test], place: str, *, column: str) -> str:
    """The function that assertions call first. Raises BadData where there is none."""
    defined = _defined(parsed(solution, f"{place}: the solution"))
    texts = (test.code for test in tests if isinstance(test, AssertTest))
    called = [name for text in texts for name in _called(ast.parse(text))]
    found = next((name for name in called if name in defined or not solution), "")
    if not found:
        raise BadData(f"{place}: no function's name in the column {column!r}; name it with {_NAMED_BY}")
    return found
