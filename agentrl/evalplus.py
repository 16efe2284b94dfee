"""HumanEval+ and MBPP+: inputs and a reference become a problem; the reference runs in a sandbox, never here.

Comparison is EvalPlus's (release 0.3): Python's ``==``, or, where the answer is a float or a list of floats
or the row has an ``atol``, one type and numpy's ``allclose`` with that, else 1e-6; ``find_zero`` by the
polynomial's value at the answer; the results of some functions as sets, of some by whether they are None. Its
two functions with a second accepted reading, "are_equivalent" and "sum_div", are compared with the reference
alone. Inputs on which the reference raises or needs most of its memory are left out, since nothing is right
there, and those on which it gives more than a megabyte.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from typing import Any

from agentrl.errors import BadData
from agentrl.judge import AssertTest, CallTest, Problem
from agentrl.judging.line import python
from agentrl.judging.plain import decode, encode
from agentrl.rows import Row
from agentrl.sandbox import Limits, Sandbox, SandboxLost

__all__ = ["REFERENCE_LIMITS", "plus_problem"]

# For a reference on all of its inputs: 1,000 of them, some of a hundred kilobytes.
REFERENCE_LIMITS = Limits(cpu_s=60.0, wall_s=180.0, memory_mib=1024, output_kib=1 << 16)
_MOST_MEMORY_MIB = 768  # of its process: one input that needs more does not cost the others their answers
_TOLERANCE = 1e-6  # between floats where the row has none

# JSON has lists only. Which of an MBPP+ task's lists are tuples: by argument (None: each of them) the levels
# of nesting, 0 the argument itself. From EvalPlus's loader, release 0.3 (evalplus/data/mbpp.py).
_EACH: Mapping[int | None, tuple[int, ...]] = {None: (0,)}
_TUPLES: Mapping[int, Mapping[int | None, tuple[int, ...]]] = {
    **dict.fromkeys((2, 116, 132, 143, 222, 261, 273, 394, 399, 421, 424, 429, 470, 560, 579, 596), _EACH),
    **dict.fromkeys((616, 630, 726, 740, 744, 809), _EACH),
    **dict.fromkeys((63, 64, 70, 94, 120, 237, 272, 299, 400, 409, 417, 438, 473, 614, 780), {None: (1,)}),
    **dict.fromkeys((75, 413, 444, 753), {0: (1,)}),
    **dict.fromkeys((106, 750), {1: (0,)}),
    **dict.fromkeys((250, 307, 405, 446, 617, 720, 763, 808), {0: (0,)}),
    **dict.fromkeys((259, 278, 401, 445), {None: (0, 1)}),
    722: {0: (1,)},
    **dict.fromkeys((580, 615, 791), {None: tuple(range(100))}),
}
_OTHERS: Mapping[int, Callable[[list[Any]], list[Any]]] = {
    115: lambda given: [[set(item) if item else {} for item in given[0]]],
    124: lambda given: [float(given[0]), complex(given[1])],
    252: lambda given: [complex(given[0])],
}
# MBPP+ functions whose results EvalPlus compares as sets.
_ANY_ORDER = frozenset(
    ("similar_elements", "find_char_long", "common_in_nested_lists", "extract_singly", "larg_nnum")
    + ("intersection_array", "find_dissimilar", "Diff")
)
# MBPP+ functions of which it compares whether they found something: the references return match objects,
# which stay in the process that made them.
_FOUND = frozenset(("check_str", "text_match_three", "text_starta_endb"))
_ASK_FOUND = "{source}\n_found = {name}\ndef {name}(*given):\n    return _found(*given) is not None\n"
_IS_FOUND = (
    "got = candidate(*{given})\nassert (got if isinstance(got, bool) else got is not None) is {wanted}"
)
# numpy.allclose with its own rtol, for numbers and what is nested of them; nan is nan.
_CLOSE = """
from math import inf, isfinite, nan
def is_close(got, wanted):
    if isinstance(wanted, (list, tuple)):
        is_long = isinstance(got, (list, tuple)) and len(got) == len(wanted)
        return is_long and all(map(is_close, got, wanted))
    if got == wanted or (got != got and wanted != wanted):
        return True
    far = abs(got - wanted)
    return isfinite(abs(wanted)) and isfinite(far) and far <= {atol} + 1e-7 * abs(wanted)
got, wanted = candidate(*{given}), {wanted}
assert got == wanted or (type(got) is type(wanted) and is_close(got, wanted))
"""
# The answer of find_zero is any root: the value there must be small.
_FIND_ZERO = (
    "import math\nxs = {inputs}\nx = candidate(xs)\n"
    "assert abs(sum(c * math.pow(x, i) for i, c in enumerate(xs))) <= {atol}"
)


def plus_problem(row: Row, place: str, *, open_sandbox: Callable[[Limits], Sandbox]) -> Problem:
    """The problem of a + row. Raises BadData where the reference fails on every input, SandboxLost."""
    number = int(row["task_id"].rpartition("/")[2]) if "assertion" in row else -1
    inputs = [_typed(number, given) for given in (*row["base_input"], *row["plus_input"])]
    if row["entry_point"] == "find_zero":
        return Problem(tests=tuple(_zeros(inputs, row["atol"])), entry_point="find_zero")
    tolerance = float(row.get("atol") or 0)
    source = row["solution"]
    if row["entry_point"] in _FOUND:
        source = _ASK_FOUND.format(source=source, name=row["entry_point"])
    asked = {
        "source": source,
        "entry_point": row["entry_point"],
        "inputs": [encode(given) for given in inputs],
        "memory_mib": _MOST_MEMORY_MIB,
    }
    answers = _answers(asked, place, open_sandbox=open_sandbox)
    tests = tuple(
        _test(f"input-{index}", row["entry_point"], given, answer[0], tolerance=tolerance)
        for index, (given, answer) in enumerate(zip(inputs, answers, strict=True))
        if answer
    )
    if not tests:
        raise BadData(f"{place}: the reference gives plain data for none of its inputs; leave the row out")
    return Problem(tests=tests, entry_point=row["entry_point"])


def _test(
    name: str, function: str, given: list[Any], answer: Any, *, tolerance: float
) -> CallTest | AssertTest:
    """The test of one input; ``answer``: the reference's, as typed data."""
    expected = decode(answer)
    if function in _FOUND:
        code = _IS_FOUND.format(given=repr(given), wanted=expected)
        return AssertTest(id=name, code=code, trust="shared")
    if function in _ANY_ORDER:
        return AssertTest(id=name, code=f"assert set(candidate(*{given!r})) == set({expected!r})")
    if tolerance or _is_floats(expected):
        code = _CLOSE.format(given=repr(given), wanted=repr(expected), atol=tolerance or _TOLERANCE)
        return AssertTest(id=name, code=code)
    return CallTest(id=name, args=tuple(given), expected=expected, numbers_alike=True)


def _zeros(inputs: Iterable[list[Any]], atol: float) -> Iterable[AssertTest]:
    for index, given in enumerate(inputs):
        yield AssertTest(
            id=f"input-{index}", code=_FIND_ZERO.format(inputs=repr(given[0]), atol=atol or 1e-4)
        )


def _answers(
    asked: Mapping[str, Any], place: str, *, open_sandbox: Callable[[Limits], Sandbox]
) -> list[list[Any]]:
    """What the reference gives for each input, as typed data; nothing where that is no answer."""
    with closing(open_sandbox(REFERENCE_LIMITS)) as sandbox:
        result = sandbox.run(python("reference_process"), stdin=json.dumps(asked).encode())
    if result.status == "lost":
        raise SandboxLost("a sandbox went away while a reference ran in it")
    try:
        answers = json.loads(result.stdout)
        assert len(answers) == len(asked["inputs"])
    except (ValueError, AssertionError, TypeError):
        raise BadData(
            f"{place}: the reference could not be run ({result.status}): "
            f"{result.stderr[-200:].decode(errors='replace')}; leave the row out"
        ) from None
    found: list[list[Any]] = answers
    return found


def _typed(number: int, given: list[Any]) -> list[Any]:
    if number in _OTHERS:
        return _OTHERS[number](given)
    levels = _TUPLES.get(number, {})
    return [
        _with_tuples(value, levels.get(place, levels.get(None, ())), 0) for place, value in enumerate(given)
    ]


def _with_tuples(value: Any, levels: tuple[int, ...], level: int) -> Any:
    if isinstance(value, dict):
        return {key: _with_tuples(item, levels, level + 1) for key, item in value.items()}
    if not isinstance(value, list) or not levels:
        return value
    items = [_with_tuples(item, levels, level + 1) for item in value]
    return tuple(items) if level in levels else items


def _is_floats(value: Any) -> bool:
    """EvalPlus's ``is_floats``, which the types of empty lists and tuples then tell apart."""
    return isinstance(value, float) or (
        isinstance(value, (list, tuple)) and all(isinstance(item, float) for item in value)
    )
