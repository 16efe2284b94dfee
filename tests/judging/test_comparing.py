"""Typed plain data: what it carries, what is refused of what comes back, what equals what."""

from __future__ import annotations

import json
import math
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentrl.judging.comparing import Garbled, check_tree, is_equal, parse, same_output, show
from agentrl.judging.plain import NotPlain, decode, encode, frame, frame_size

_NAN = float("nan")
_keys = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()
_values = st.recursive(
    _keys | st.complex_numbers(),
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(_keys | st.tuples(_keys), inner)
        | st.sets(_keys)
        | st.frozensets(_keys)
    ),
    max_leaves=20,
)


@settings(deadline=None)
@given(_values)
def test_every_plain_value_comes_back_as_it_was(value: Any) -> None:
    tree = parse(frame(encode(value))[4:])
    check_tree(tree)
    assert is_equal(encode(value), tree)
    assert repr(decode(tree)) == repr(value) or isinstance(value, set | frozenset | dict | list | tuple)
    assert isinstance(show(tree), str)


def test_a_frame_says_its_length() -> None:
    data = frame([1, "é"])
    assert frame_size(data[:4]) == len(data) - 4


@pytest.mark.parametrize(
    "value",
    [
        object(),
        print,
        type("A", (int,), {})(1),
        type("B", (list,), {})(),
        iter([]),
        range(3),
        bytearray(b"a"),
    ],
)
def test_what_is_no_exact_builtin_is_not_plain(value: Any) -> None:
    with pytest.raises(NotPlain):
        encode([value])


def test_what_is_too_deep_too_large_or_in_itself_is_not_plain() -> None:
    deep: list[Any] = []
    for _ in range(200):
        deep = [deep]
    twice: list[Any] = []
    twice += [twice, twice]
    for value in (deep, twice, [0] * 3_000_000):
        with pytest.raises(NotPlain, match="too"):
            encode(value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nothing",
        "[" * 100_000 + "]" * 100_000,
        "7" * 1_000_000,
        '{"set": [[1]]}',
        '{"dict": [[{"set": []}, 1]]}',
        '{"dict": [1]}',
        '{"dict": {"a": 1}}',
        '{"int": "7"',
        '{"int": "seven"}',
        '{"float": "1e5"}',
        '{"bytes": "xyz"}',
        '{"complex": [1, 2]}',
        '{"complex": [1.0]}',
        '{"complex": [{}, 1.0]}',
        '{"complex": [{"int": "zz"}, 1.0]}',
        '{"complex": [{"int": 5}, 1.0]}',
        '{"complex": [{"float": "abc"}, 1.0]}',
        '{"complex": [{"float": []}, 1.0]}',
        '{"complex": [{"float": "nan", "int": "1"}, 1.0]}',
        '{"eval": "1"}',
        '{"list": [1]}',
        '{"tuple": 1}',
        '{"tuple": [], "set": []}',
        "{}",
        '{"set": [{"dict": []}]}',
        "[" * 150 + "]" * 150,
        '{"tuple": [' * 150 + "1" + "]}" * 150,
    ],
)
def test_what_encoding_never_writes_is_garbled(text: str) -> None:
    with pytest.raises(Garbled):
        check_tree(parse(text.encode()))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, 1.0),
        (10**400, 10**400),
        (_NAN, _NAN),
        ([_NAN, (1,)], [_NAN, (1.0,)]),
        (0.0, -0.0),
        ({1, 2}, frozenset({2, 1})),
        ({1: 2, "a": 3}, {"a": 3, 1: 2}),
        ({1.0: 2}, {1: 2}),
        (1 + 0j, 1 + 0j),
        ("\ud800", "\ud800"),
    ],
)
def test_equal_values(one: Any, other: Any) -> None:
    assert is_equal(encode(one), encode(other))
    assert is_equal(encode(other), encode(one))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, True),
        (0, False),
        (1, "1"),
        (None, 0),
        ([1], (1,)),
        ([1, 2], [2, 1]),
        ({1: 2}, {1: 3}),
        ({1: 2}, {True: 2}),
        ({1}, [1]),
        (b"a", "a"),
        (10**400, math.inf),
        (1.0, 1.0 + 1e-12),
        ({}, set()),
        (_NAN, None),
    ],
)
def test_values_that_differ(one: Any, other: Any) -> None:
    assert not is_equal(encode(one), encode(other))
    assert not is_equal(encode(other), encode(one))


def test_a_tolerance_is_absolute_for_small_numbers_and_relative_for_large_ones() -> None:
    assert is_equal(0.0, 0.009, tolerance=0.01)
    assert is_equal(1000.0, 1009.0, tolerance=0.01)
    assert not is_equal(1000.0, 1011.0, tolerance=0.01)
    assert is_equal([1, {"dict": [["a", 2.0]]}], [1.001, {"dict": [["a", 2]]}], tolerance=0.01)
    assert not is_equal(encode(math.inf), 1e300, tolerance=1.0)
    assert not is_equal(encode(10**400), encode(-(10**400)), tolerance=1.0)


def test_lists_and_tuples_are_alike_where_it_is_said() -> None:
    assert is_equal(encode([1, [2]]), encode((1, (2,))), alike=True)
    assert not is_equal(encode([1, [2]]), encode((1, (3,))), alike=True)


def test_numbers_are_alike_where_it_is_said_as_in_python() -> None:
    for one, other in ((True, 1), (0.0, False), (1, 1 + 0j), (2.5 + 0j, 2.5), (True, 1 + 0j), ([True], [1])):
        assert one == other
        assert is_equal(encode(one), encode(other), numbers_alike=True)
        assert is_equal(encode(other), encode(one), numbers_alike=True)
        assert not is_equal(encode(one), encode(other))
    for one, other in ((True, 2), (1, 1 + 1j), (True, "True"), (None, False), ("1", 1), (math.inf, 1 + 0j)):
        assert not is_equal(encode(one), encode(other), numbers_alike=True)
        assert not is_equal(encode(other), encode(one), numbers_alike=True)


def test_keys_that_collide_on_purpose_take_no_longer() -> None:
    prime = (1 << 61) - 1  # hashes of integers are modulo this
    tree = {"set": [{"int": hex(index * prime)} for index in range(1 << 3, 20_000)]}
    begun = time.monotonic()
    check_tree(tree)
    assert is_equal(tree, json.loads(json.dumps(tree)))
    show(tree)
    assert time.monotonic() - begun < 20  # as a set of integers: minutes


def test_outputs_are_lines_without_blanks_at_their_ends() -> None:
    assert same_output("1\n2\n", b"1 \r\n2\t\n\n\n")
    assert same_output("", b"\n")
    assert not same_output("1 2", b"1  2")
    assert not same_output("1", b"\n1")
    assert not same_output("\ufffd", b"\xff")


def test_a_shown_value_is_short() -> None:
    assert show(encode({"a": (1,), "b": [2.5, None]})) == "{'a': (1,), 'b': [2.5, None]}"
    assert len(show(encode([["x" * 1000] * 50] * 1000))) == 200
    assert len(show(encode(10**100_000))) == 200
