"""One test of a row becomes a test of the judge, or BadData that says where, what and what instead.

A test is an assertion as a text, or a mapping: ``code``, an assertion again, with how it is run (``trust``,
``in_place``: see ``AssertTest``); ``stdin`` and ``stdout``, or ``input`` and ``output``, of a program;
``args`` and ``expected`` of a function, with ``kwargs`` and ``tolerance``. Each may have ``visible``. None
for what a test may have is as if it were not there, since that is how tables leave a cell empty. Nothing is
guessed: what has another type, or another name, is refused.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from agentrl.errors import BadData, did_you_mean
from agentrl.judge import AssertTest, CallTest, IOTest, Test
from agentrl.judging.verdicts import Trust
from agentrl.rows import whole_text

__all__ = ["checked_text", "parsed", "read_test"]

# By what a test must have: what else it may.
_FORMS: Mapping[tuple[str, ...], tuple[str, ...]] = {
    ("stdin", "stdout"): ("visible",),
    ("input", "output"): ("visible",),
    ("args", "expected"): ("kwargs", "tolerance", "visible"),
    ("code",): ("trust", "in_place", "visible"),
}
_KEYS = tuple(dict.fromkeys(key for form in _FORMS.items() for keys in form for key in keys))
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
_CALL_HINT = "; for a call of a function write args, a list, and expected"


def read_test(test: Any, number: int, place: str, *, visible: bool) -> Test:
    """Test ``number`` of the row at ``place``; ``visible``: where it does not say. Raises BadData."""
    where, name = f"{place}: test {number}", f"test-{number}"
    if isinstance(test, str):
        return AssertTest(id=name, code=_assertion(test, where), visible=visible)
    form = _form_of(test)
    if form is None:
        hint = next(filter(None, (did_you_mean(key, _KEYS) for key in _unknown(test, _KEYS))), "")
        raise BadData(
            f"{where} is {str(test)[:80]!r}{hint}; a test is an assertion as a text or as code, or has stdin "
            "and stdout, or args and expected"
        )
    allowed = (*form, *_FORMS[form])
    for key in _unknown(test, allowed):
        raise BadData(
            f"{where} has {key!r}{did_you_mean(str(key), allowed)}; one with {' and '.join(form)} may have "
            f"{', '.join(_FORMS[form])}: rename or remove it"
        )
    shown = _flag(test, "visible", where, default=visible)
    if form == ("code",):
        return _assert_test(test, name, where, visible=shown)
    if form == ("args", "expected"):
        return _call_test(test, name, where, visible=shown)
    given, printed = (checked_text(test[key], f"{where} has {key}", or_else=_CALL_HINT) for key in form)
    return IOTest(id=name, stdin=given, stdout=printed, visible=shown)


def checked_text(value: Any, what: str, *, or_else: str = "") -> str:
    """``value``, where it is a text that can be written. Raises BadData; ``or_else``: the next step."""
    if not isinstance(value, str):
        raise BadData(f"{what}={str(value)[:80]!r} ({type(value).__name__}): it is a text{or_else}")
    return whole_text(value, what)


def parsed(source: str, where: str) -> ast.Module:
    """``source`` as Python. Raises BadData where it is none, or is nested too deep."""
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        why = error.msg if isinstance(error, SyntaxError) else str(error) or "nested too deep"
        raise BadData(
            f"{where}: Python that can't be parsed: {why}: {source[:80]!a}; mend or remove the row"
        ) from None


def _form_of(test: Any) -> tuple[str, ...] | None:
    """What is there of what a test must have; only ``expected`` may be None."""
    if not isinstance(test, Mapping):
        return None
    there = {key for key, value in test.items() if value is not None or key == "expected"}
    return next((form for form in _FORMS if there >= set(form)), None)


def _unknown(test: Any, allowed: tuple[str, ...]) -> list[str]:
    if not isinstance(test, Mapping):
        return []
    return [str(key) for key, value in test.items() if key not in allowed and value is not None]


def _assert_test(test: Mapping[str, Any], name: str, where: str, *, visible: bool) -> AssertTest:
    trust: Any = "remote" if test.get("trust") is None else test["trust"]
    if trust not in get_args(Trust):
        raise BadData(f"{where} has trust={trust!r}: it is {' or '.join(map(repr, get_args(Trust)))}")
    return AssertTest(
        id=name,
        code=_assertion(test["code"], where),
        visible=visible,
        trust=trust,
        in_place=_flag(test, "in_place", where, default=False),
    )


def _call_test(test: Mapping[str, Any], name: str, where: str, *, visible: bool) -> CallTest:
    args, kwargs = test["args"], {} if test.get("kwargs") is None else test["kwargs"]
    if not isinstance(args, list | tuple):
        raise BadData(
            f"{where} has args={str(args)[:80]!r} ({type(args).__name__}): it is a list of the function's "
            "arguments, and those that have a name go into kwargs, an object"
        )
    if not isinstance(kwargs, Mapping) or not all(isinstance(key, str) for key in kwargs):
        raise BadData(
            f"{where} has kwargs={str(kwargs)[:80]!r} ({type(kwargs).__name__}): it is an object of the "
            "function's arguments by their names; a list of them is args"
        )
    tolerance = 0.0 if test.get("tolerance") is None else test["tolerance"]
    is_number = isinstance(tolerance, int | float) and not isinstance(tolerance, bool)
    if not (is_number and 0 <= tolerance <= sys.float_info.max):
        raise BadData(
            f"{where} has tolerance={str(tolerance)[:80]!r}: it is a finite number of at least 0; "
            "leave it out for equality"
        )
    return CallTest(
        id=name,
        args=tuple(args),
        kwargs=dict(kwargs),
        expected=test["expected"],
        tolerance=float(tolerance),
        alike=True,
        visible=visible,
    )


def _flag(test: Mapping[str, Any], key: str, where: str, *, default: bool) -> bool:
    value = test.get(key)
    if value is not None and not isinstance(value, bool):
        raise BadData(f"{where} has {key}={str(value)[:80]!r}: it is true or false, not a text or a number")
    return default if value is None else value


def _assertion(code: Any, where: str) -> str:
    """``code``, where something in it can fail. Raises BadData."""
    text = checked_text(code, f"{where} has code")
    tree = parsed(text, where)
    if not any(isinstance(node, ast.Assert | ast.Call | ast.Raise) for node in _executed(tree)):
        raise BadData(
            f"{where} is {text[:80]!r}, which every program passes: outside of functions it has no assert, "
            "no raise and no call; write 'assert ...', or remove the test"
        )
    return text


def _executed(tree: ast.Module) -> Iterator[ast.AST]:
    """What is run with ``tree``: all but the insides of functions."""
    left: list[ast.AST] = [tree]
    while left:
        node = left.pop()
        yield node
        inner = ast.iter_child_nodes(node)
        left += (child for child in inner if not isinstance(child, _FUNCTIONS))
