r"""math-verify's verdict on boxed answers. Runs inside a worker process only: importing it loads sympy.

Answers that the text alone rules out are told apart first, in one pass: math-verify computes, and drops bases
and units. Decimals are compared to six digits after the point, or to six significant ones where the truth is
below one. math-verify turns whatever goes wrong with an expression into "not equal", a refused allocation
included; its own time-outs are off, because the worker pool has the clock.

Where the truth is written out, an answer has to be too, or the checker would compute for the policy. Written
out are a decimal (``-1,234.5``), a fraction of two (``3/4``, ``\frac{36}{2}``, ``3:4``), a mixed number
(``1\frac{3}{4}``), a power of ten with or without a factor (``2.5 \times 10^{-7}``, ``1e5``) and infinity:
each with one sign, with currency, per cent, degrees or a unit, behind ``x =``; and lists, sets, intervals and
matrices of such. Every other operator or function makes an expression (``48 + 24``, ``17 \cdot 23``,
``2^{10}``, ``\gcd(48, 14)``, ``\sqrt{9}``), and an expression is no answer where a number was asked for. Of
``48 + 24 = 72`` the right side counts, unless the truth is an equation: then a name stands on the left. A
truth that is itself an expression, such as ``3\sqrt{13}`` or ``2^{10}``, restricts nothing.

Words are compared as text, for as mathematics BDCA is the product ABCD: whatever has at least two letters and
nothing else, but two or three lower-case letters without ``\text``, which are a product. Bases (``204_5``)
and units (``10 \text{ m/s}``, ``5 cm^2``) are compared where both sides name one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal
from functools import lru_cache
from typing import Any

from math_verify import LatexExtractionConfig, parse, verify
from sympy import Abs, floor, log

__all__ = ["CORRECT", "NO_TRUTH", "WRONG", "may_equal", "readable", "same_word", "verdict"]

CORRECT, WRONG, NO_TRUTH = "correct", "wrong", "no truth"

_CONFIG = (LatexExtractionConfig(boxed_match_priority=0),)
_DIGITS = 6  # of a decimal that are compared
_PRECISION = 15  # digits in which sympy compares what is no decimal

_SPACING = r"(?:\\[,;:! ]|~|\s)"
_THOUSANDS = re.compile(rf"(?<![0-9.,])[0-9]{{1,3}}(?:{_SPACING}+[0-9]{{3}})+(?![0-9])")
_EXPONENT = re.compile(
    r"(?<![A-Za-z0-9.])([0-9]++(?:\.[0-9]*+)?|\.[0-9]++)[eE]([+-]?[0-9]++)(?![A-Za-z0-9.])"
)

# Quantifiers are possessive (*+) where two could share a run of spaces or digits: that keeps it one pass.
_SIGN = r"(?:\+|-|\N{MINUS SIGN}|\\pm(?![a-z])|\\mp(?![a-z]))?\s*+"
_DECIMAL = r"(?:[0-9]++(?:\.[0-9]*+)?|\.[0-9]++)"
_POWER = r"10\s*+\^\s*+(?:\{\s*+[+-]?\s*+[0-9]++\s*+\}|[+-]?[0-9]++)"
_TERM = rf"(?:\{{\s*+{_SIGN}(?:{_POWER}|{_DECIMAL})\s*+\}}|[0-9])"
_FRACTION = r"\\[dtc]?frac\s*+"
_MIXED = (
    rf"(?P<whole>[0-9]++)\s*+{_FRACTION}"
    r"(?:\{\s*+(?P<upper>[0-9]++)\s*+\}|(?P<one>[0-9]))\s*+(?:\{\s*+(?P<lower>[0-9]++)\s*+\}|(?P<other>[0-9]))"
)
_TIMES = r"(?:\\times|\\cdot|[*\u00d7\u00b7])"
_NUMBER = (
    rf"(?:{_FRACTION}{_TERM}\s*+{_TERM}|{_POWER}|{_MIXED}|\\infty"
    rf"|{_DECIMAL}(?:\s*+[/:]\s*+{_SIGN}{_DECIMAL}|\s*+{_TIMES}\s*+{_POWER})?)"
)
_CURRENCY = r"(?:(?:\\?\$|[\u20ac\u00a3\u00a5\u20b9]|\\pounds)\s*+)*+"
# A word may name a unit, but e and i are numbers: 3e^2 is an expression.
_AFTER = (
    r"(?:\s|\\?[%$]|\^?\s*+\\circ(?![a-z])|\^\s*+\{\s*+\\circ\s*+\}|[\u00b0\u20ac\u00a3'\u00b2\u00b3]|/"
    r"|(?![eEiI]++(?![A-Za-z]))[A-Za-z]++\.?(?:\s*+\^\s*+(?:[0-9]|\{\s*+-?[0-9]\s*+\}))?"
    r"|_\s*+(?:[0-9]++|\{\s*+[0-9]++\s*+\}))*+"
)
_OPEN, _CLOSE = r"(?:\s|[(\[{]|\\[{])*+", r"(?:\s|[)\]}.]|\\[}])*+"
_WRITTEN = re.compile(
    rf"{_OPEN}{_CURRENCY}{_SIGN}{_CURRENCY}{_OPEN}{_NUMBER}{_AFTER}{_CLOSE}{_AFTER}{_CLOSE}"
)
_NAME = re.compile(r"[\s({\[]*+\\?[A-Za-z]++(?:_(?:[A-Za-z0-9]|\{[A-Za-z0-9]+\}))?\s*+(?:\([A-Za-z]\))?\s*+")
_RELATED = re.compile(r"^\s*+[A-Za-z]\s*+\\(?:in|approx)(?![a-z])")
_SEPARATOR = re.compile(r"[,;]|\\cup(?![a-z])|(?<![A-Za-z])(?:and|or)(?![A-Za-z])")
_MATRIX = re.compile(r"\\(?:begin|end)\s*\{[a-z]*matrix\}")
_CELL_END = re.compile(r"\\\\|&")
_TEXT = re.compile(r"\\(?:text[a-z]*|math[a-z]+|mbox|operatorname)\s*\{([^{}]*)\}")
_LAYOUT = re.compile(r"\\(?:left|right|displaystyle|q?quad)(?![a-z])|\\[,;:! ()]|~")
_COMMAS = re.compile(r"(?<=[0-9])(?:\{,\}|,)\s*(?=[0-9]{3}(?![0-9]))")

_SCIENTIFIC = re.compile(
    rf"({_SIGN})({_DECIMAL})\s*+{_TIMES}\s*+10\s*+\^\s*+\{{?\s*+([+-]?[0-9]{{1,2}})\s*+\}}?({_AFTER})"
)
_KEPT = re.compile(r"[eEiI\s]*|[,\s]*(?:and|or)\s*|.*[0-9].*", re.DOTALL)  # of \text{...}: not a unit

_BARE_WORD = re.compile(r"(?<![A-Za-z\\])[A-Za-z]+")
_LETTERS = re.compile(r"[A-Za-z][A-Za-z\s'\"-]*")
_BASE = re.compile(r"[0-9)]\s*_\s*(?:\{\s*\(?([0-9]+)\)?\s*\}|([0-9]+))")

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
_POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
_TAIL = re.compile(r"[0-9}](?:[^0-9}^]|\^(?:\s*+\{?\s*+-?[0-9]\s*+\}?)?)*+$")
_UNIT_TOKEN = re.compile(r"([a-z]+)\.?(?:\s*\^?\s*\{?\s*(-?[0-9])\s*\}?)?|(/)")


def verdict(payload: dict[str, Any]) -> str:
    """CORRECT where all of ``payload["answers"]`` equal ``payload["truth"]``, else WRONG or NO_TRUTH."""
    truth = readable(payload["truth"])
    if not _parsed_truth(truth)[0]:
        return NO_TRUTH
    return CORRECT if all(_equal(truth, readable(answer)) for answer in payload["answers"]) else WRONG


def _equal(truth: str, answer: str) -> bool:
    if same_word(truth, answer):
        return True
    if not may_equal(truth, answer):
        return False
    parsed, zeros = _parsed_truth(truth)
    precision = max(_PRECISION, 2 * _DIGITS + zeros)  # sympy drops what is below 10**-precision
    return bool(
        verify(
            parsed,
            _parsed(answer),
            float_rounding=_DIGITS + zeros,
            numeric_precision=precision,
            timeout_seconds=None,
        )
    )


@lru_cache(maxsize=4096)
def _parsed_truth(truth: str) -> tuple[list[Any], int]:
    """The truth, and how many zeros the smallest of its numbers has after the point: 1 for 0.05."""
    parsed = _parsed(truth)
    sizes = [size for whole in parsed[:1] for size in _sizes(whole)]
    small = [size for size in sizes if size.is_Number and size.is_finite and 0 < size < 1]
    return parsed, -1 - int(floor(log(min(small), 10))) if small else 0


def _sizes(expression: Any) -> Iterator[Any]:
    """The absolute values of the numbers in an expression, roughly; each as large as it goes."""
    if getattr(expression, "is_number", False):
        yield Abs(expression).evalf(_PRECISION)
    else:
        for part in getattr(expression, "args", ()):
            yield from _sizes(part)


def _parsed(answer: str) -> list[Any]:
    parsed: list[Any] = parse(
        f"\\boxed{{{answer}}}", _CONFIG, extraction_mode="first_match", parsing_timeout=None
    )
    return parsed


# -- what the text says that the value does not --


def readable(text: str) -> str:
    r"""``text`` as math-verify reads it right: 1\,234 as 1234, 1e5 and 1 \times 10^5 as 100000."""
    text = text.strip().removesuffix(".")
    text = _THOUSANDS.sub(lambda match: re.sub(_SPACING, "", match[0]), text)
    text = _EXPONENT.sub(r"\1 \\times 10^{\2}", text)
    number = _SCIENTIFIC.fullmatch(text)
    if not number:
        return text
    sign, decimal, exponent, unit = number.groups()
    return f"{sign}{Decimal(f'{decimal}e{exponent}'):f}{unit}"


def may_equal(truth: str, answer: str) -> bool:
    """False where the texts, both ``readable``, rule it out that the answer is the truth."""
    word = _word(truth)
    if word:
        return word == _letters(answer)
    for named in (_bases, _units):
        if len({named(truth), named(answer)} - {None}) > 1:
            return False
    is_number = _is_written_out(truth, truth) and not _has_variable(truth)
    return not is_number or _is_written_out(answer, truth)


def same_word(truth: str, answer: str) -> bool:
    """Is the truth a word, and the answer the same one?"""
    word = _word(truth)
    return bool(word) and word == _letters(answer)


def _is_written_out(text: str, truth: str) -> bool:
    r"""Is every number of ``text`` written out? The truth says whether ``=`` and ``\\`` have a meaning."""
    if "matrix" in truth:
        text = _CELL_END.sub(",", _MATRIX.sub(" ", text)).strip(" ,")
    text = _COMMAS.sub("", _LAYOUT.sub(" ", _TEXT.sub(_unit_or_inside, text)))
    return all(_is_number(piece, is_equation="=" in truth) for piece in _SEPARATOR.split(text))


def _has_variable(truth: str) -> bool:
    """Is a bare word of one to three letters in it that is no unit, as in 2k?"""
    bare = _SEPARATOR.split(_TEXT.sub(" ", truth))
    words = [
        word for piece in bare for word in _BARE_WORD.findall(_RELATED.sub("", piece).rpartition("=")[2])
    ]
    return any(len(word) == 1 or (len(word) < 4 and word not in _UNITS) for word in words)


def _is_number(piece: str, *, is_equation: bool) -> bool:
    left, _, right = _RELATED.sub("", piece).rpartition("=")
    if is_equation and left and not _NAME.fullmatch(left):
        return False
    match = _WRITTEN.fullmatch(right)
    if match and match["whole"]:
        upper, lower = match["upper"] or match["one"], match["lower"] or match["other"]
        return (len(upper), upper) < (len(lower), lower)  # else it is a sum: 48\frac{48}{2} is 72
    return bool(match)


def _inside(wrapped: re.Match[str]) -> str:
    return f" {wrapped[1]} "


def _unit_or_inside(wrapped: re.Match[str]) -> str:
    return f" {wrapped[1]} " if _KEPT.fullmatch(wrapped[1]) else " unit "


def _word(text: str) -> str:
    """The letters of a text that is a word, "" for anything else."""
    letters = _letters(text)
    is_product = len(letters) < 4 and "\\" not in text and text == text.lower()
    return "" if len(letters) < 2 or is_product else letters


def _letters(text: str) -> str:
    text = _LAYOUT.sub(" ", _TEXT.sub(_inside, text)).rpartition("=")[2].strip(" ()[]{}.\"'$")
    return "".join(filter(str.isalpha, text)).lower() if _LETTERS.fullmatch(text) else ""


def _bases(text: str) -> tuple[str, ...] | None:
    """Of the numerals, without repetition."""
    return tuple(sorted({braced or bare for braced, bare in _BASE.findall(text)})) or None


def _units(text: str) -> frozenset[tuple[str, int]] | None:
    """The unit at the end, as powers: {("m", 1), ("s", -1)}; None without, or of unknown words."""
    text = text[-80:].lower().replace("\u00b2", "^2").replace("\u00b3", "^3")
    tail = _TAIL.search(_LAYOUT.sub(" ", _TEXT.sub(_inside, text)))
    powers: Counter[str] = Counter()
    sign, power = 1, 0
    for word, exponent, slash in _UNIT_TOKEN.findall(tail[0] if tail else ""):
        unit = _UNITS.get(word) or _UNITS.get(word.removesuffix("s"))
        if slash or word == "per":
            sign = -1
        elif word in _POWERS:
            power = _POWERS[word]
        elif unit is None:
            return None
        else:
            powers[unit] += sign * (int(exponent) if exponent else power or 1)
            power = 0
    # "$5 per hour" names no unit of what there is per hour: there is nothing to compare.
    return frozenset(powers.items()) if any(count > 0 for count in powers.values()) else None
