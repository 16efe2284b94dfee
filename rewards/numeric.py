r"""A number against a number, exactly or under a tolerance.

1.0 where the answer's number is the truth's, else 0.0. Numbers are integers, decimals, ``1,234``, ``2.5e3``,
``-3/4``, ``\frac{3}{4}`` and ``1\frac{3}{4}`` (7/4), with an optional dollar sign; they are compared as exact
fractions and nothing is evaluated. Units, per cent signs and arithmetic are not numbers: for those there is
``boxed``.
"""

from __future__ import annotations

import math
import re
from decimal import Decimal
from fractions import Fraction
from numbers import Integral, Rational, Real
from typing import Any

from agentrl.answers import boxed_answers, shortened, truth_of, visible_text
from agentrl.errors import BadConfig, BadData
from agentrl.reward import Evidence
from agentrl.types import Score

__all__ = ["Numeric", "parse_number"]

_MAX_CHARS = 4_000  # of one number: below the digits that int() refuses (4,300)
_MAX_EXPONENT = 4_000  # decimal; 1e999999999 written out is a gigabyte
_WINDOW = 20_000  # characters at the end of a text in which its last number is looked for

_DECIMAL = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
# A minus after a digit, a letter or a bracket subtracts: in "5-3" the last number is 3.
_NUMBER = re.compile(rf"((?<![0-9A-Za-z)])[+-])?(?:\$\s*)?({_DECIMAL})(?:\s*/\s*({_DECIMAL}))?")
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
_SPACING = r"(?:\\[,;:! ]|~)"  # LaTeX's
_THOUSANDS = re.compile(rf"(?<![0-9.,])[0-9]{{1,3}}(?:{_SPACING}+[0-9]{{3}})+(?![0-9])")
_BETWEEN_DIGITS = re.compile(rf"(?<=[0-9]){_SPACING}+(?=[0-9.])")
_LATEX_SPACING = re.compile(_SPACING)
_MIXED = re.compile(
    rf"(?<![0-9.,])([0-9]{{1,40}})(?:{_SPACING}|\s)*+\\[dt]?frac\s*\{{([0-9]{{1,40}})\}}\s*\{{([0-9]{{1,40}})\}}"
)


class Numeric:
    r"""Is the number in ``\boxed{...}`` (``boxed=False``: the last number in the text) the truth? 1.0 or 0.0.

    Only the last assistant message counts, outside its thinking. Of several boxes there the worst counts: a
    list of guesses is not an answer. Equal means ``|x - truth| <= max(absolute, relative * |truth|)``. Raises
    BadData where the task's truth is no number.
    """

    inline = True

    def __init__(
        self, *, key: str = "answer", boxed: bool = True, absolute: float = 0.0, relative: float = 0.0
    ) -> None:
        for name, tolerance in (("absolute", absolute), ("relative", relative)):
            if not (math.isfinite(tolerance) and tolerance >= 0):
                raise BadConfig(f"numeric has {name}={tolerance!r}: a tolerance is finite and at least 0")
        self.key = key
        self.boxed = boxed
        self.absolute = absolute
        self.relative = relative
        self._slack = _exactly(absolute), _exactly(relative)

    def __call__(self, evidence: Evidence) -> Score:
        """1.0 or 0.0, with parts ``correct``; the note says why an answer has no number."""
        truth = _truth_number(truth_of(evidence.task, self.key), evidence.task.id)
        answer = evidence.answer
        boxes = dict.fromkeys(boxed_answers(answer))
        said = [parse_number(box) for box in boxes] if self.boxed else [_last_number(answer)]
        correct = float(bool(said) and all(self._equal(number, truth) for number in said))
        return Score(correct, {"correct": correct}, "" if correct else _why(said))

    def _equal(self, said: Fraction | None, truth: Fraction) -> bool:
        absolute, relative = self._slack
        return said is not None and abs(said - truth) <= max(absolute, relative * abs(truth))


def parse_number(text: str) -> Fraction | None:
    """The number that the whole of ``text`` is, exactly; None for anything else and beyond 4,000 digits."""
    if len(text) > _MAX_CHARS:
        return None
    match = _NUMBER.fullmatch(_plain(text).strip(" \n\t$"))
    return match and _value(match)


def _plain(text: str) -> str:
    """LaTeX's ways to write a number, and the typographic minus, as ASCII."""
    text = _MIXED.sub(_improper, text)
    text = _LATEX_FRACTION.sub(_with_slash, text).replace("\\$", "$").replace("{,}", ",")
    text = _THOUSANDS.sub(lambda match: _LATEX_SPACING.sub("", match[0]), text)
    text = _LATEX_SPACING.sub("", _BETWEEN_DIGITS.sub(" ", text))
    return text.replace("\N{MINUS SIGN}", "-")


def _improper(mixed: re.Match[str]) -> str:
    r"""``1\frac{3}{4}`` as 7/4; as it was where the fraction isn't below one, for that is no mixed number."""
    whole, numerator, denominator = map(int, mixed.groups())
    return f"{whole * denominator + numerator}/{denominator}" if numerator < denominator else mixed[0]


def _with_slash(fraction: re.Match[str]) -> str:
    """A space goes in front where a digit stands there: 1 and 1/2 are not 11/2."""
    before = fraction.string[max(fraction.start() - 1, 0) : fraction.start()]
    return f"{' ' * before.isdigit()}{fraction[1]}/{fraction[2]}"


def _value(match: re.Match[str]) -> Fraction | None:
    sign, *terms = match.groups()
    values = [_decimal(term) for term in terms if term is not None]
    if None in values or values[1:] == [0]:
        return None
    numerator, *denominator = [value for value in values if value is not None]
    value = numerator / denominator[0] if denominator else numerator
    return -value if sign == "-" else value


def _decimal(text: str) -> Fraction | None:
    mantissa, _, exponent = text.replace(",", "").lower().partition("e")
    if len(text) > _MAX_CHARS or abs(int(exponent or 0)) > _MAX_EXPONENT:
        return None
    return Fraction(f"{mantissa}e{exponent or 0}")


def _last_number(text: str) -> Fraction | None:
    last = None
    for match in _NUMBER.finditer(_plain(visible_text(text)[-_WINDOW:])):
        last = match
    return last and _value(last)


def _why(said: list[Fraction | None]) -> str:
    if not said:
        return "no boxed answer"
    if len(said) > 1:
        return f"{len(said)} different answers, not all right"
    return "no number" if said[0] is None else "another number than the truth"


def _exactly(number: Real | Decimal | float) -> Fraction:
    """The fraction that the shortest decimal of ``number`` says: 1/10 for 0.1."""
    return Fraction(str(number))


def _truth_number(truth: Any, task_id: str) -> Fraction:
    number = None
    if isinstance(truth, str):
        number = parse_number(truth)
    elif isinstance(truth, bool):
        pass  # an int to Python, no number to people
    elif isinstance(truth, Integral):
        number = Fraction(int(truth))
    elif isinstance(truth, Rational):
        number = Fraction(int(truth.numerator), int(truth.denominator))
    elif isinstance(truth, (Real, Decimal)) and math.isfinite(truth):
        number = _exactly(truth)
    if number is None:
        raise BadData(
            f"task {task_id!r} has the truth {shortened(str(truth))}, which is no number: "
            "correct the task, or score it with 'boxed' or 'exact'"
        )
    return number
