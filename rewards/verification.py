"""math-verify's verdict on boxed answers. Runs inside a worker process only: importing it loads sympy.

math-verify turns whatever goes wrong with an expression into "not equal", a refused allocation included; its
own time-outs are off, because the worker pool has the clock. It drops units, so that 10 cm would equal 10 m:
units that both sides name are compared here.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from math_verify import LatexExtractionConfig, parse, verify

__all__ = ["CORRECT", "NO_TRUTH", "WRONG", "verdict"]

CORRECT, WRONG, NO_TRUTH = "correct", "wrong", "no truth"

_CONFIG = (LatexExtractionConfig(boxed_match_priority=0),)
_UNITS = {
    **dict.fromkeys(("mm", "millimeter", "millimetre"), "mm"),
    **dict.fromkeys(("cm", "centimeter", "centimetre"), "cm"),
    **dict.fromkeys(("m", "meter", "metre"), "m"),
    **dict.fromkeys(("km", "kilometer", "kilometre"), "km"),
    **dict.fromkeys(("in", "inch", "inche"), "in"),
    **dict.fromkeys(("ft", "foot", "feet"), "ft"),
    **dict.fromkeys(("yd", "yard"), "yd"),
    **dict.fromkeys(("mi", "mile"), "mi"),
    **dict.fromkeys(("mg", "milligram"), "mg"),
    **dict.fromkeys(("g", "gram"), "g"),
    **dict.fromkeys(("kg", "kilogram"), "kg"),
    **dict.fromkeys(("lb", "pound"), "lb"),
    **dict.fromkeys(("oz", "ounce"), "oz"),
    **dict.fromkeys(("s", "sec", "second"), "s"),
    **dict.fromkeys(("min", "minute"), "min"),
    **dict.fromkeys(("h", "hr", "hour"), "h"),
    **dict.fromkeys(("day",), "day"),
    **dict.fromkeys(("week",), "week"),
    **dict.fromkeys(("month",), "month"),
    **dict.fromkeys(("year", "yr"), "year"),
    **dict.fromkeys(("ml", "milliliter", "millilitre"), "ml"),
    **dict.fromkeys(("l", "liter", "litre"), "l"),
    **dict.fromkeys(("cent",), "cent"),
    **dict.fromkeys(("dollar",), "dollar"),
}
# A number, then a word in \text{...} or bare, perhaps to a power, at the end.
_UNIT = re.compile(
    r"[0-9}]\s*(?:\\[ ,;]\s*)?(?:\\(?:text|mbox|mathrm|textrm)\s*\{\s*([A-Za-z]+)\.?\s*\}|([A-Za-z]+))"
    r"\s*(?:\^\s*\{?\s*[0-9]\s*\}?)?\s*$"
)


def verdict(payload: dict[str, Any]) -> str:
    """CORRECT where all of ``payload["answers"]`` equal ``payload["truth"]``, else WRONG or NO_TRUTH."""
    truth = payload["truth"]
    if not _parsed_truth(truth):
        return NO_TRUTH
    return CORRECT if all(_equal(truth, answer) for answer in payload["answers"]) else WRONG


def _equal(truth: str, answer: str) -> bool:
    units = {_unit(truth), _unit(answer)} - {None}
    return len(units) < 2 and bool(verify(_parsed_truth(truth), _parsed(answer), timeout_seconds=None))


@lru_cache(maxsize=4096)
def _parsed_truth(truth: str) -> list[Any]:
    return _parsed(truth)


def _parsed(answer: str) -> list[Any]:
    boxed = f"\\boxed{{{answer.strip().removesuffix('.')}}}"
    parsed: list[Any] = parse(boxed, _CONFIG, extraction_mode="first_match", parsing_timeout=None)
    return parsed


def _unit(answer: str) -> str | None:
    match = _UNIT.search(answer[-80:])
    word = (match.group(1) or match.group(2)).lower() if match else ""
    return _UNITS.get(word) or _UNITS.get(word.removesuffix("s"))
