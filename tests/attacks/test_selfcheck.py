"""The self-check: what it calls held, broken and not enforced, on real backends and on one that lies."""

from __future__ import annotations

import gc
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from agentrl.attacks.attack import Attack
from agentrl.attacks.backend_contract import CONTRACT
from agentrl.attacks.bait import baited, children, count_descriptors
from agentrl.attacks.catalogue import ATTACKS, COMMANDS, VERDICTS
from agentrl.attacks.scenarios import SCENARIOS
from agentrl.attacks.selfcheck import Report, self_check
from agentrl.attacks.stage import Stage
from agentrl.attacks.verdict_trials import verdict_trials
from agentrl.cli import app
from agentrl.errors import BadConfig
from agentrl.registry import _registered, make_sandbox
from agentrl.sandbox import GUARANTEES, LIMITS, Backend, Limits, Sandbox, Survey
from agentrl.sandboxing.doctor import strongest, survey_all

# Where no engine answers, docker's SDK leaves the socket of its connection to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")

# What a host survives of the catalogue where nothing is enforced.
_HARMLESS = (
    "read-other-environments",
    "read-a-home",
    "find-other-rollouts",
    "connect-to-sockets",
    "reach-the-host",
    "abstract-sockets",
    "see-processes",
    "kill-a-process-of-the-host",
    "kill-everything",
    "kill-the-first",
    "hold-capabilities",
    "leave-a-daemon",
    "thread-bomb",
    "memory-in-a-memfd",
    "fill-work",
    "links-to-the-host",
)


@pytest.fixture(autouse=True)
def _collected() -> Iterator[None]:
    yield
    gc.collect()


class Liar:
    """A plain process that claims to enforce everything."""

    name = "liar"

    def __init__(self) -> None:
        self._inner = make_sandbox("process")

    def survey(self) -> Survey:
        return Survey(available=True, enforced=dict.fromkeys((*LIMITS, *GUARANTEES), "it says"))

    def open(self, limits: Limits) -> Any:
        return _LiarsSession(
            self._inner.open(
                Limits(
                    cpu_s=None,
                    memory_mib=None,
                    pids=None,
                    disk_mib=None,
                    wall_s=limits.wall_s,
                    output_kib=limits.output_kib,
                    network=True,
                )
            )
        )

    def sweep(self) -> int:
        return 0

    def close(self) -> None:
        self._inner.close()


class _LiarsSession:
    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def run(self, argv: Any, *, stdin: Any = b"", files: Any = None, limits: Any = None) -> Any:
        return self._inner.run(argv, stdin=stdin, files=files)

    def read(self, path: str, *, most_bytes: int = 1 << 20) -> bytes:
        """Follows links, as open() does."""
        with (self._inner._folder / path).open("rb") as file:
            return bytes(file.read(most_bytes))

    def write(self, path: str, data: bytes) -> None:
        self._inner.write(path, data)

    def close(self) -> None:
        self._inner.close()


def _results(report: Report) -> Mapping[str, str]:
    return {row.name: row.result for row in report.rows}


@pytest.mark.slow
def test_a_backend_that_lies_is_found_out() -> None:
    report = self_check(Liar(), adversarial=True, only=_HARMLESS)
    results = _results(report)
    assert not report.ok
    assert {name: results[name] for name in _HARMLESS} == dict.fromkeys(_HARMLESS, "BROKEN")
    assert results["no process survives"] == "BROKEN" or "leave-a-daemon" in {
        row.name for row in report.broken
    }


def test_verdicts_are_not_tried_where_a_sandbox_shares_the_hosts_processes() -> None:
    report = self_check(Liar(), adversarial=True, only=["leave-os-exit [call]"])
    assert _results(report)["leave-os-exit [call]"] == "not tried"


def test_what_a_backend_does_not_claim_is_called_not_enforced_and_not_tried() -> None:
    begun = time.monotonic()
    results = _results(self_check("process", adversarial=True, only=["fork-bomb", "read-a-home", "abort"]))
    assert (results["fork-bomb"], results["read-a-home"]) == ("not enforced", "not enforced")
    assert results["abort"] == "held"
    assert time.monotonic() - begun < 60


def test_the_contract_holds_for_the_process_backend_as_far_as_it_goes() -> None:
    report = self_check("process")
    assert report.ok, report.broken
    assert report.counts["held"] > 20
    assert report.counts["not enforced"] > 3


def test_a_name_that_is_no_check_is_refused() -> None:
    with pytest.raises(BadConfig, match="nothing of the self-check has the name"):
        self_check("process", only=["no such check"])
    with pytest.raises(BadConfig, match="name or the group contrcat; did you mean 'contract'"):
        self_check("process", only=["exit code and output are told", "contrcat"])


class _Breaks:
    """A backend with a bug."""

    name = "breaks"

    def survey(self) -> Survey:
        return make_sandbox("process").survey()

    def open(self, limits: Limits) -> Sandbox:
        raise TypeError("a bug of its own")

    def sweep(self) -> None:
        pass

    def close(self) -> None:
        pass


def test_a_backend_with_a_bug_has_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    report = self_check(_Breaks(), only=["exit code and output are told"])
    assert [row.detail for row in report.broken] == ["TypeError: a bug of its own"]

    def fails() -> Backend:
        raise RuntimeError("no such machine")

    monkeypatch.setitem(_registered["sandbox"], "fails", fails)
    surveys = survey_all()
    assert surveys["fails"].note == "it fails: RuntimeError: no such machine"
    assert surveys["process"].available


def test_a_self_check_leaves_nothing_behind() -> None:
    before = (count_descriptors(), children(), os.environ.get("AGENTRL_BAIT"))
    self_check("process", only=["exit code and output are told"])
    assert (count_descriptors(), children(), os.environ.get("AGENTRL_BAIT")) == before


def test_the_baits_notice_a_caller() -> None:
    import socket

    with baited() as bait:
        with socket.create_connection(("127.0.0.1", bait.port)) as client:
            assert client.recv(100) == bait.secret.encode()
        until = time.monotonic() + 10
        while not bait.visits and time.monotonic() < until:
            time.sleep(0.01)
        assert len(bait.visits) == 1
        assert bait.missing() == []
        (bait.home / ".netrc").write_text("changed", encoding="utf-8")
        (bait.home / "planted").touch()
        assert bait.missing() == [".netrc changed", "planted is new"]
        assert bait.secret not in json.dumps(bait.facts)


def test_the_catalogue_is_large_and_its_names_are_unique() -> None:
    names = [attack.name for attack in ATTACKS]
    assert len(set(names)) == len(names)
    assert len(COMMANDS) > 100
    assert len(VERDICTS) > 100
    assert all(attack.tries for attack in ATTACKS)


@pytest.mark.parametrize("attack", COMMANDS, ids=lambda attack: attack.name)
def test_an_attacks_source_is_python(attack: Any) -> None:
    compile(attack.source, attack.name, "exec")


def test_the_command_prints_a_table_and_writes_json(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    command = ["sandbox", "selfcheck", "--backend", "process", "--only", "a talk is heard and hears"]
    done = CliRunner().invoke(app, [*command, "--json", str(path)])
    assert done.exit_code == 0, done.output
    report = json.loads(path.read_text(encoding="utf-8"))
    assert report["counts"]["held"] == len(report["rows"])
    assert "a talk is heard" in done.output


def test_the_command_fails_where_something_broke() -> None:
    here = f"{Path(__file__)}:Liar"
    command = ["sandbox", "selfcheck", "--backend", here, "--adversarial", "--only", "see-processes"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 1, done.output
    assert "BROKEN" in done.output


def test_the_doctor_speaks_of_every_backend() -> None:
    done = CliRunner().invoke(app, ["sandbox", "doctor"])
    for name in survey_all():
        assert name in done.output
    assert done.exit_code in (0, 1)


def test_the_strongest_is_never_the_process_backend() -> None:
    if not any(survey_all()[name].available for name in ("docker", "zygote", "bubblewrap")):
        with pytest.raises(BadConfig, match="Install one"):
            strongest(Limits())
        return
    backend = strongest(Limits())
    assert backend.name in ("docker", "zygote", "bubblewrap")
    backend.close()


def _available(name: str) -> Backend:
    backend = make_sandbox(name)
    if not backend.survey().available:
        required = os.environ.get("AGENTRL_REQUIRE", "").split(",")
        assert {"bubblewrap": "bwrap"}.get(name, name) not in required, backend.survey().note
        pytest.skip(backend.survey().note)
    return backend


_OF_DOCKER = (
    *sorted({check.group for check in (*CONTRACT, *SCENARIOS)} | {attack.group for attack in COMMANDS}),
    *(check.name for check in verdict_trials() if check.name.endswith("[assert]")),
)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bubblewrap", "zygote", pytest.param("docker", marks=pytest.mark.docker)])
def test_every_attack_of_the_catalogue_is_withstood(name: str) -> None:
    _available(name).close()
    # Every container costs half a second: of the attacks on verdicts, docker is put to one way of judging.
    only = _OF_DOCKER if name == "docker" else ()
    report = self_check(name, adversarial=True, only=only)
    assert [f"{row.name}: {row.detail}" for row in report.broken] == []
    open_to = {row.name for row in report.rows if row.result in ("not enforced", "not tried")}
    assert all(row.endswith("[files]") for row in open_to), open_to


_WAITS = """
import os, sys, time
from probe import *
time.sleep(0.6)
{found}
done()
"""


@pytest.mark.parametrize(
    ("found", "broken"),
    [("", ""), ("print('BROKEN: a way out')", "BROKEN: a way out"), ("time.sleep(60)", "status wall")],
)
def test_an_attack_that_a_slow_host_cut_off_is_tried_with_more_time(found: str, broken: str) -> None:
    attack = Attack(
        name="slow", group="files", tries="wait", source=_WAITS.format(found=found), limits={"wall_s": 0.5}
    )
    backend = make_sandbox("process")
    with baited() as bait, closing(backend):
        told = Stage(backend=backend, label="", survey=backend.survey(), bait=bait).play(attack)
    assert told.startswith(broken)
    assert bool(told) == bool(broken)


def test_what_broke_before_an_attack_was_cut_off_is_told() -> None:
    source = "print('BROKEN: a way out', flush=True)\nimport time\ntime.sleep(60)\n"
    attack = Attack(name="slow", group="files", tries="wait", source=source, limits={"wall_s": 0.5})
    backend = make_sandbox("process")
    with baited() as bait, closing(backend):
        begun = time.monotonic()
        told = Stage(backend=backend, label="", survey=backend.survey(), bait=bait).play(attack)
    assert told == "BROKEN: a way out"
    assert time.monotonic() - begun < 4  # not tried again


@pytest.mark.parametrize("name", ["bubblewrap", "zygote"])
def test_a_word_of_the_contract_is_kept(name: str) -> None:
    """All of it is among the slow ones."""
    _available(name).close()
    promises = [
        "limit: memory, and life goes on",
        "a talk is heard and hears",
        "files persist in a session",
        "what lies where a file goes is the policy's fault",
        "no room for a file is the policy's fault",
        "a working directory can't be locked",
        "words that no program can be given are the policy's fault",
        "stdin, stdout and stderr can be opened by name",
    ]
    report = self_check(name, only=promises)
    assert [f"{row.name}: {row.detail}" for row in report.broken] == []
    assert {*promises} <= {row.name for row in report.rows if row.result == "held"}
