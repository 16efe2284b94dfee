"""The longest past is found again, whatever was held, given up and exchanged before."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from agentrl.engines.pasts import Pasts

ROWS = 4
PAST = st.lists(st.sampled_from(b"ab"), max_size=3).map(bytes)  # few, so that rows share them
CHANGE = st.one_of(
    st.tuples(st.just("hold"), st.integers(0, ROWS - 1), PAST),
    st.tuples(st.just("swap"), st.integers(0, ROWS - 1), st.integers(0, ROWS - 1)),
)


@given(st.lists(CHANGE, max_size=20), PAST.filter(bool))
def test_the_longest_past_of_a_prompt_is_found(changes: list[tuple[str, int, object]], prompt: bytes) -> None:
    pasts, held = Pasts(ROWS), [b""] * ROWS
    for change in changes:
        match change:
            case "hold", int(row), bytes(past):
                pasts.hold(row, past)
                held[row] = past
            case "swap", int(first), int(second):
                pasts.swap(first, second)
                held[first], held[second] = held[second], held[first]
    assert [pasts[row] for row in range(ROWS)] == held
    fitting = [past for past in held if past and prompt.startswith(past) and past != prompt]
    found = pasts.longest(prompt)
    if not fitting:
        assert found is None
    else:
        assert found is not None
        row, size = found
        assert held[row] == max(fitting, key=len)
        assert size == len(held[row])
