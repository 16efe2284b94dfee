"""What the README prints works as printed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import agentrl
from agentrl.config import EngineConfig
from agentrl.sandboxing.doctor import survey_all

_README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", _README, flags=re.DOTALL)


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """A folder with the README's environment, saved as the README says."""
    (tmp_path / "shop.py").write_text(_blocks("python")[0], encoding="utf-8")
    return tmp_path


def test_the_printed_environment_passes_every_check(shop: Path) -> None:
    report = agentrl.check(f"{shop / 'shop.py'}:Shop")
    assert report.ok, [row for row in report.rows if not row.passed]


def test_the_printed_check_command_runs_beside_the_printed_file(shop: Path) -> None:
    printed = [line for block in _blocks("bash") for line in block.splitlines()]
    command = next(line.partition("#")[0].split() for line in printed if line.startswith("agentrl check"))
    agentrl_command = str(Path(sys.executable).with_name("agentrl"))
    done = subprocess.run(
        [agentrl_command, *command[1:]], cwd=shop, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_printed_problems_are_sound(tmp_path: Path) -> None:
    if not any(survey_all()[name].available for name in ("zygote", "bubblewrap", "docker")):
        pytest.skip("no sandbox for programs here")
    (tmp_path / "train.jsonl").write_text(_blocks("jsonl")[0], encoding="utf-8")
    env = agentrl.make("code", dataset=str(tmp_path), sandbox="auto")
    tasks = env.unwrapped.task_list("train")  # type: ignore[attr-defined]
    assert [task.id for task in tasks] == ["double", "sum"]
    for index, task in enumerate(tasks):
        env.reset(options={"split": "train", "index": index})
        assert env.step(*env.unwrapped.gold(task))[1] == 1.0  # type: ignore[attr-defined]
    env.close()


def test_the_first_two_commands_are_the_quickstart_and_the_tests() -> None:
    install = 'pip install -c constraints.txt -e ".[dev]"'
    commands = [block.strip() for block in _blocks("bash")]
    assert commands[:2] == [f"{install} && agentrl train configs/quickstart.yaml", f"{install} && pytest"]


def test_the_printed_engines_are_sections_of_a_configuration() -> None:
    (block,) = _blocks("yaml")
    engines = [EngineConfig.model_validate(one["engine"]) for one in yaml.safe_load_all(block)]
    assert [engine.kind for engine in engines] == ["embedded", "vllm", "openai"]


def test_every_packaged_configuration_begins_with_the_command_that_runs_it() -> None:
    for path in sorted((Path(__file__).parent.parent / "configs").glob("*.yaml")):
        lines = path.read_text(encoding="utf-8").splitlines()
        assert lines[0].startswith(f"# agentrl train configs/{path.name}"), path
        assert len(lines) <= 40, path
