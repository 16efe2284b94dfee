"""What of this host no run sees, wherever it lies."""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

import agentrl
from agentrl.registry import make_sandbox
from agentrl.rows import Files
from agentrl.sandbox import Limits
from agentrl.sandboxing import private
from agentrl.sandboxing.private import hidden_in, private_folders


def test_the_library_and_the_working_directory_are_private(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(private, "_kept", set())  # by other tests, some in a folder around this one
    monkeypatch.chdir(tmp_path)
    folders = private_folders()
    for hidden in (*agentrl.__path__, tmp_path):
        path = Path(hidden).resolve()
        assert any(path.is_relative_to(folder) for folder in folders)


@pytest.mark.parametrize("folder", ["/", "/usr", "/usr/local", "/usr/lib", "/usr/bin", "stdlib"])
def test_what_programs_need_is_not(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = os.path.realpath(sysconfig.get_path(folder) if folder == "stdlib" else folder)
    monkeypatch.chdir(path)
    assert path not in private_folders()


def test_a_folder_is_hidden_where_it_is_seen_but_not_one_that_was_asked_for() -> None:
    shown = {"/usr": "/usr", "/opt/venv/packages": "/packages/0"}
    private = ["/usr/src/app", "/usr2/x", "/opt/venv/packages/agentrl", "/opt/venv/packages"]
    assert hidden_in(shown, private) == ["/usr/src/app", "/packages/0/agentrl"]


def test_where_data_and_what_is_named_by_its_file_lie_is_private(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(private, "_kept", set())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "env.py").write_text("from agentrl.environments.calculator import Calculator\n")
    agentrl.make(f"{tmp_path}/mine/env.py:Calculator")
    Files("data", {"train": tmp_path / "data" / "train.jsonl"})
    assert {str(tmp_path / "mine"), str(tmp_path / "data")} <= {*private_folders()}
    Files("more", {"train": tmp_path / "all.jsonl"})  # around the others, which need not be named then
    assert str(tmp_path) in private_folders()
    assert str(tmp_path / "data") not in private_folders()


@pytest.fixture
def project(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory below /usr, as containers have it, with a secret."""
    folder = Path(f"/usr/src/agentrl-test-{os.getpid()}")
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        pytest.skip(f"no folder can be made in /usr/src: {error}")
    (folder / "hidden_tests.json").write_text("secret")
    monkeypatch.chdir(folder)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("name", ["zygote", "bubblewrap"])
def test_a_run_sees_nothing_of_a_project_below_usr(name: str, project: Path, tmp_path: Path) -> None:
    packages = tmp_path / "packages"
    (packages / "allowed").mkdir(parents=True)
    (packages / "allowed" / "__init__.py").write_text("")
    settings = {"packages": [str(packages)]} if name == "zygote" else {}
    backend = make_sandbox(name, **settings)
    survey = backend.survey()
    if not survey.available or survey.missing:
        pytest.skip(f"no full {name} here: {survey.note} {dict(survey.missing)}")
    code = f"import os; print(os.listdir({str(project)!r}), os.path.exists({str(Path(agentrl.__file__))!r}))"
    try:
        sandbox = backend.open(Limits())
        assert sandbox.run(["python3", "-c", code]).stdout == b"[] False\n"
        if settings:
            assert sandbox.run(["ls", "/packages/0"]).stdout == b"allowed\n"
        assert sandbox.run(["touch", str(project / "x")]).exit_code == 1
    finally:
        backend.close()
