"""Which tasks a step trains on."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from agentrl.schedule import Schedule


@given(size=st.integers(1, 40), seed=st.integers(0, 99), passes=st.integers(1, 4))
def test_every_pass_takes_each_task_once(size: int, seed: int, passes: int) -> None:
    taken = Schedule(size, seed=seed, name="train").take(0, size * passes)
    for first in range(0, size * passes, size):
        assert sorted(taken[first : first + size]) == list(range(size))


@given(size=st.one_of(st.none(), st.integers(1, 30)), start=st.integers(0, 100), count=st.integers(0, 50))
def test_what_a_step_takes_depends_on_its_place_alone(size: int | None, start: int, count: int) -> None:
    whole = Schedule(size, seed=3, name="train").take(0, start + count)
    assert Schedule(size, seed=3, name="train").take(start, count) == whole[start:]


def test_passes_names_and_seeds_have_orders_of_their_own() -> None:
    def order(seed: int = 0, name: str = "train", start: int = 0) -> list[int]:
        return Schedule(50, seed=seed, name=name).take(start, 50)

    orders = [order(), order(start=50), order(seed=1), order(name="probe")]
    assert len({tuple(one) for one in orders}) == 4


def test_a_split_of_unknown_size_is_taken_as_it_comes() -> None:
    assert Schedule(None, seed=0, name="train").take(5, 4) == [5, 6, 7, 8]
