"""What a process that is forked from this one has of our descriptors."""

from __future__ import annotations

import os

import pytest

from agentrl.sandboxing.inherited import keep, release


def _in_a_child(descriptor: int) -> str:
    """Where it leads in a process that is forked now."""
    heard, said = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(said, os.readlink(f"/proc/self/fd/{descriptor}").encode())
        os._exit(0)
    os.close(said)
    os.waitpid(child, 0)
    told = os.read(heard, 1000).decode()
    os.close(heard)
    return told


@pytest.fixture
def ours() -> int:
    read, write = os.pipe()
    os.close(write)
    return read


def test_what_is_kept_leads_nowhere_in_a_child_until_it_is_released(ours: int) -> None:
    assert _in_a_child(ours).startswith("pipe:")
    keep(ours)
    assert _in_a_child(ours) == os.devnull
    release(ours)
    assert _in_a_child(ours).startswith("pipe:")
    os.close(ours)


def test_a_number_that_was_closed_without_a_word_and_is_anothers_now_is_left_alone(ours: int) -> None:
    keep(ours)
    os.close(ours)
    other = os.open(__file__, os.O_RDONLY)
    os.dup2(other, ours)
    assert _in_a_child(ours) == os.path.realpath(__file__)
    release(ours)
    os.close(ours)
    if other != ours:
        os.close(other)
