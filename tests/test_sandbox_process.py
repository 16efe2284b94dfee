"""The process backend, and with it what every backend's run shares: pipes, clocks, names of files."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from agentrl.errors import BadConfig
from agentrl.registry import make_sandbox
from agentrl.sandbox import Channel, Gone, Limits, Sandbox, SandboxLost

_TRUSTED = Limits(
    cpu_s=None, memory_mib=None, pids=None, disk_mib=None, wall_s=20, output_kib=1024, network=True
)


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    backend = make_sandbox("process")
    yield backend.open(_TRUSTED)
    backend.close()


def test_what_it_cannot_enforce_is_refused() -> None:
    with pytest.raises(BadConfig, match="can't enforce cpu_s here: .* set cpu_s=None"):
        make_sandbox("process").open(Limits())


def test_a_command_has_its_output_and_its_exit_code(sandbox: Sandbox) -> None:
    result = sandbox.run(["sh", "-c", "cat; echo err >&2; exit 3"], stdin=b"in")
    assert (result.status, result.fault, result.exit_code) == ("error", "policy", 3)
    assert (result.stdout, result.stderr, result.truncated) == (b"in", b"err\n", 0)
    assert result.wall_ms > 0


def test_files_stay_from_run_to_run_until_it_is_closed(sandbox: Sandbox) -> None:
    sandbox.run(["sh", "-c", "cat a/b > c"], files={"a/b": b"kept"})
    assert sandbox.read("c") == b"kept"
    sandbox.close()
    with pytest.raises(SandboxLost):
        sandbox.read("c")


def test_the_wall_clock_ends_a_run(sandbox: Sandbox) -> None:
    begun = time.monotonic()
    result = sandbox.run(["sleep", "60"], limits=Limits(**{**_limits(), "wall_s": 0.3}))
    assert (result.status, result.fault, result.signal) == ("wall", "policy", 9)
    assert time.monotonic() - begun < 10


def test_head_and_tail_of_an_output_are_kept_and_the_rest_counted(sandbox: Sandbox) -> None:
    result = sandbox.run(
        ["sh", "-c", "printf A; head -c 5000 /dev/zero; printf Z"],
        limits=Limits(**{**_limits(), "output_kib": 1}),
    )
    assert result.status == "ok"
    assert len(result.stdout) == 1024
    assert (result.stdout[:1], result.stdout[-1:]) == (b"A", b"Z")
    assert result.truncated == 5002 - 1024


def test_an_endless_output_ends_the_run(sandbox: Sandbox) -> None:
    result = sandbox.run(["cat", "/dev/zero"])
    assert (result.status, result.fault) == ("output", "policy")
    assert len(result.stdout) == 1024 * 1024


def test_input_that_is_never_read_does_no_harm(sandbox: Sandbox) -> None:
    assert sandbox.run(["true"], stdin=bytes(50 << 20)).status == "ok"


def test_an_echo_of_much_input_does_not_lock(sandbox: Sandbox) -> None:
    data = bytes(500_000)
    assert sandbox.run(["cat"], stdin=data).stdout == data


def test_a_talk_hears_and_is_heard(sandbox: Sandbox) -> None:
    heard = []

    def talk(channel: Channel) -> None:
        for word in (b"one\n", b"two\n"):
            channel.send(word)
            heard.append(channel.receive(100))

    assert sandbox.run(["cat"], stdin=talk).status == "ok"
    assert heard == [b"one\n", b"two\n"]


def test_a_talk_with_somebody_who_leaves_is_told(sandbox: Sandbox) -> None:
    heard = []

    def talk(channel: Channel) -> None:
        while True:  # until Gone
            heard.append(channel.receive(100))

    result = sandbox.run(["sh", "-c", "echo last words; exit 4"], stdin=talk)
    assert (b"".join(heard), result.exit_code) == (b"last words\n", 4)


def test_a_talk_ends_at_the_wall_clock(sandbox: Sandbox) -> None:
    limits = Limits(**{**_limits(), "wall_s": 0.3})
    result = sandbox.run(["sleep", "60"], stdin=lambda channel: print(channel.receive(1)), limits=limits)
    assert result.status == "wall"


def test_a_talk_that_puts_up_with_the_end_does_not_hide_a_limit(sandbox: Sandbox) -> None:
    def talk(channel: Channel) -> None:
        with suppress(Gone):
            channel.receive(1)

    limits = Limits(**{**_limits(), "wall_s": 0.3})
    assert sandbox.run(["sleep", "60"], stdin=talk, limits=limits).status == "wall"


def test_speaking_to_one_who_left_words_behind_ends(sandbox: Sandbox) -> None:
    heard = []

    def talk(channel: Channel) -> None:
        with pytest.raises(Gone):
            channel.send(bytes(1 << 20))  # a grandchild holds the other end open and does not read
        heard.append(channel.receive(100))

    result = sandbox.run(["sh", "-c", "sleep 60 <&0 >/dev/null 2>&1 & echo last; exit 3"], stdin=talk)
    assert heard == [b"last\n"]
    assert result.wall_ms < 15_000


def test_a_flood_that_nobody_listens_to_is_ended(sandbox: Sandbox) -> None:
    def talk(channel: Channel) -> None:
        channel.send(bytes(1 << 20))

    assert sandbox.run(["sh", "-c", "exec cat /dev/zero"], stdin=talk).status == "output"


def test_a_bug_in_a_talk_comes_out_and_nothing_survives(sandbox: Sandbox) -> None:
    def talk(channel: Channel) -> None:
        raise ZeroDivisionError(channel.receive(100).decode())

    with pytest.raises(ZeroDivisionError) as raised:
        sandbox.run(["sh", "-c", "echo $$; exec sleep 60"], stdin=talk)
    with pytest.raises(ProcessLookupError):
        os.kill(int(str(raised.value)), 0)


def test_a_command_that_is_too_long_is_the_policys(sandbox: Sandbox) -> None:
    result = sandbox.run(["sh", "-c", "#" * (4 << 20)])
    assert (result.status, result.fault, result.exit_code) == ("error", "policy", 126)


def test_a_folder_that_was_locked_is_opened_again_and_removed_with_all_that_is_inside() -> None:
    code = (
        "import os; os.makedirs('a/b'); os.chmod('a/b', 0); os.chmod('a', 0); print(os.getcwd()); "
        "os.chmod('.', 0)"
    )
    with _as_nobody():
        sandbox = make_sandbox("process").open(_TRUSTED)
        folder = Path(sandbox.run(["python3", "-c", code]).stdout.decode().strip())
        assert sandbox.run(["cat", "given"], files={"given": b"1"}).stdout == b"1"
        assert sandbox.read("given") == b"1"
        sandbox.close()
        assert not folder.exists()


@contextmanager
def _as_nobody() -> Iterator[None]:
    """Whom modes keep out; root passes everywhere."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(before)


def test_closing_ends_a_run_in_progress(sandbox: Sandbox) -> None:
    timer = threading.Timer(0.2, sandbox.close)
    timer.start()
    result = sandbox.run(["sleep", "60"])
    timer.join()
    assert (result.status, result.fault) == ("lost", "world")


def test_a_run_may_lower_limits_but_not_raise_them(sandbox: Sandbox) -> None:
    with pytest.raises(BadConfig, match="wall_s=21 in a sandbox opened with 20"):
        sandbox.run(["true"], limits=Limits(**{**_limits(), "wall_s": 21}))


@pytest.mark.parametrize("path", ["", "/etc/passwd", "../x", "a/../b", "a\0b", "a\nb", "a//b", "x" * 5000])
def test_names_that_lead_elsewhere_are_refused(sandbox: Sandbox, path: str) -> None:
    with pytest.raises(BadConfig, match="names no file of a sandbox"):
        sandbox.write(path, b"")
    with pytest.raises(BadConfig, match="names no file of a sandbox"):
        sandbox.read(path)


def test_links_and_pipes_are_no_files(sandbox: Sandbox) -> None:
    sandbox.run(["sh", "-c", "ln -s /etc/passwd link; ln -s /etc folder; mkfifo pipe; mkdir real"])
    for path in ("link", "folder/passwd", "pipe", "real", "none"):
        with pytest.raises(FileNotFoundError):
            sandbox.read(path)
    sandbox.write("link", b"ours")
    assert sandbox.read("link") == b"ours"
    with pytest.raises(OSError, match="Not a directory|symbolic"):
        sandbox.write("folder/passwd", b"")


def _limits() -> dict[str, float | bool | None]:
    return {name: getattr(_TRUSTED, name) for name in Limits.__slots__}
