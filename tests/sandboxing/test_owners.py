"""Marks of processes: alive, ended, ended but not waited for, and of a pid that is used again."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

from agentrl.sandboxing.owners import MARK, is_gone, this_process

_SAY_MARK = "from agentrl.sandboxing.owners import this_process; print(this_process(), flush=True); input()"


def test_this_process_is_not_gone() -> None:
    mark = this_process()
    assert re.fullmatch(MARK, mark)
    assert not is_gone(mark)


def test_an_owner_is_gone_once_it_has_ended_waited_for_or_not() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _SAY_MARK], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        mark = child.stdout.readline().strip()
        assert not is_gone(mark)
        child.kill()
        until = time.monotonic() + 10
        while ") Z " not in Path(f"/proc/{child.pid}/stat").read_text() and time.monotonic() < until:
            time.sleep(0.01)
        assert is_gone(mark)
    assert is_gone(mark)


def test_a_pid_that_is_used_again_is_not_its_earlier_owner() -> None:
    namespace, pid, start = this_process().split("-")
    assert is_gone(f"{namespace}-{pid}-{int(start) - 1}")


def test_of_another_pid_namespace_nothing_is_known() -> None:
    namespace, pid, start = this_process().split("-")
    assert not is_gone(f"{int(namespace) + 1}-{pid}-{int(start) - 1}")
    assert not is_gone("docker")
