"""What is installed: the wheel has catalogues and configurations inside the package, and runs anywhere."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

_ROOT = Path(__file__).parent.parent
_SOURCES = (
    "agentrl",
    "environments",
    "rewards",
    "sandboxes",
    "configs",
    "pyproject.toml",
    "README.md",
    "LICENSE",
)
_A_SHORT_RUN = (
    "steps=1 optimizer.warmup_steps=0 rollout.tasks_per_step=2 model.tiny.texts=64 "
    "warm_start.episodes=64 warm_start.steps=2 warm_start.probe_every=1 warm_start.probe_tasks=2 "
    "evaluation.tasks=2 evaluation.every=0 evaluation.curve_tasks=null"
)


def _run(*command: str | Path, cwd: Path) -> str:
    """The command's stdout, without this process's way to the checkout."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is packaged, so that building leaves nothing in the checkout."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in _SOURCES:
        if (_ROOT / name).is_dir():
            shutil.copytree(_ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(_ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(checkout: Path) -> Path:
    _run(sys.executable, "-m", "build", "--wheel", "--no-isolation", ".", cwd=checkout)
    (built,) = (checkout / "dist").glob("*.whl")
    return built


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    folder = tmp_path / "empty"
    folder.mkdir()
    return folder


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """The interpreter of a fresh environment that sees this one's libraries, behind its own."""
    _run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return tmp_path / "venv" / "bin" / "python"


def _install(python: Path, *what: str | Path, cwd: Path) -> None:
    # --ignore-installed: this environment may hold the package already, which pip must not touch.
    options = ("--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed", "--quiet")
    _run(sys.executable, "-m", "pip", "--python", python, "install", *options, *what, cwd=cwd)


def test_the_wheel_holds_the_catalogues_and_configurations_inside_the_package(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert wheel.name.startswith("agentrl_gym-")
    assert {
        "agentrl/__init__.py",
        "agentrl/py.typed",
        "agentrl/environments/calculator.py",
        "agentrl/environments/data/basics.jsonl",
        "agentrl/rewards/numeric.py",
        "agentrl/configs/quickstart.yaml",
    } <= names
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"agentrl", "agentrl_gym"}


@pytest.mark.slow
def test_the_installed_wheel_works_in_an_empty_folder(wheel: Path, python: Path, empty: Path) -> None:
    _install(python, wheel, cwd=empty)
    agentrl = python.with_name("agentrl")
    assert "quickstart" in _run(agentrl, "list", cwd=empty)
    assert _run(agentrl, "version", cwd=empty).strip() == wheel.name.split("-")[1]
    _run(agentrl, "check", "calculator", cwd=empty)
    _run(agentrl, "train", "quickstart", *_A_SHORT_RUN.split(), cwd=empty)
    assert {"before", "after"} <= set(json.loads((empty / "runs/quickstart/summary.json").read_text()))
    assert "pass@1" in _run(agentrl, "show", "quickstart", cwd=empty)


@pytest.mark.slow
def test_an_editable_install_works_in_an_empty_folder(checkout: Path, python: Path, empty: Path) -> None:
    _install(python, "-e", checkout, cwd=empty)
    found = _run(python, "-c", "import agentrl.environments as e; print(e.__file__)", cwd=empty)
    assert Path(found.strip()) == checkout / "environments" / "__init__.py"
    _run(python.with_name("agentrl"), "check", "calculator", cwd=empty)
