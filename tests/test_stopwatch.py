from __future__ import annotations

import pytest

from agentrl.stopwatch import Stopwatch


def test_amounts_and_seconds_add_up_until_they_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([10.0, 12.0, 20.0, 23.5])
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    watch = Stopwatch()
    for _ in range(2):
        with watch.timing("time/decode_s"):
            watch.count("rollout/tokens", 4)
    assert watch.take() == {"rollout/tokens": 8, "time/decode_s": 5.5}
    assert watch.take() == {}


def test_a_block_that_fails_has_taken_its_time_too() -> None:
    watch = Stopwatch()
    with pytest.raises(KeyError), watch.timing("time/decode_s"):
        raise KeyError
    assert watch.take()["time/decode_s"] >= 0


def test_the_device_is_waited_for_before_the_time_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    monkeypatch.setattr("time.perf_counter", lambda: float(len(events)))
    with Stopwatch(wait=lambda: events.append("waited")).timing("time/decode_s"):
        events.append("computed")
    assert events == ["computed", "waited"]
