"""Files of a container, without an engine: what its code arranged is the code's own fault."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import tempfile
from contextlib import closing
from types import SimpleNamespace
from typing import Any

import pytest

from agentrl.sandbox import Limits
from agentrl.sandboxes.docker import _Session
from agentrl.sandboxing.container_link import Link, LinkLost

_LOCKED = """
import os, sys
from agentrl.sandboxing import container_process as first
if os.geteuid() == 0:
    os.chown(sys.argv[1], 4242, 4242)
    os.setgroups([]); os.setgid(4242); os.setuid(4242)
first._WORK = sys.argv[1]
for mode in (0, 0o1000):
    os.chmod(sys.argv[1], mode)
    with first._parent("a/b", make=True) as (parent, name):
        os.close(os.open(name, os.O_CREAT | os.O_WRONLY, dir_fd=parent))
    os.chmod(sys.argv[1], mode)
    reader, writer = os.pipe()
    first._start(["ls"], (reader, 1, 2))
    os.wait()
"""


def test_the_first_process_enters_a_working_directory_that_was_locked() -> None:
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-c", _LOCKED.replace("sys.argv[1]", repr(folder)), "{}"],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (done.stdout, done.stderr) == ("a\na\n", "")
        os.chmod(folder, 0o700)


def test_a_file_that_can_t_be_written_is_the_policy_s_error() -> None:
    def write(path: str, data: bytes, *, within_s: float) -> None:
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), path)

    container: Any = SimpleNamespace(link=SimpleNamespace(write=write, is_torn=False))
    pool: Any = SimpleNamespace(take=lambda shape: container, leave=lambda container: None)
    engine: Any = None
    session = _Session(engine, pool, Limits(), on_close=lambda session: None)
    result = session.run(["true"], files={"solution.py": b""})
    assert (result.status, result.fault, result.exit_code) == ("error", "policy", 126)
    assert b"Is a directory" in result.stderr
    session.close()


def test_a_container_that_takes_no_file_is_given_up_at_the_deadline() -> None:
    ours, frozen = socket.socketpair()
    with frozen, closing(Link(ours)) as link, pytest.raises(LinkLost, match="took no file in 0.2 s"):
        link.write("large", bytes(8 << 20), within_s=0.2)
