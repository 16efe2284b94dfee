"""The first signal asks, any other interrupts, and handlers are put back."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from agentrl.stop_signal import Interrupted, StopSignal


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_is_held_asks_and_the_second_interrupts(number: signal.Signals) -> None:
    with StopSignal() as stop, stop.held():
        assert stop.number is None
        send(number)
        assert stop.number == number
        with pytest.raises(Interrupted) as caught:
            send(signal.SIGTERM)
    assert caught.value.number == signal.SIGTERM


def test_a_signal_that_is_not_held_interrupts_at_once() -> None:
    with StopSignal() as stop:
        with stop.held():
            pass
        with pytest.raises(KeyboardInterrupt, match="SIGTERM"):
            send(signal.SIGTERM)
        assert stop.number is None


def test_the_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopSignal():
        assert signal.getsignal(signal.SIGTERM) != before[1]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_outside_the_main_thread_signals_stay_as_they_are() -> None:
    before, seen = signal.getsignal(signal.SIGINT), []

    def enter() -> None:
        with StopSignal():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join(timeout=10)
    assert seen == [before]
