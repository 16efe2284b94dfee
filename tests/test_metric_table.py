"""The README's table of metrics and what a run writes are the same."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import agentrl
from agentrl.alarms import RULES, Rule
from agentrl.config import RunConfig
from agentrl.log import RunFolder, read_rows

_README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
_SECTION = _README.partition("\n## Metrics\n")[2].partition("\n## ")[0]
_CELLS = [
    [cell.strip() for cell in line.strip("|").split("|")] for line in _SECTION.splitlines() if "|" in line
]
_ROWS = {name: cells for cells in _CELLS[2:] for name in re.findall(r"`([^`]+)`", cells[0])}


def _pattern(name: str) -> str:
    """``fault/<boundary>`` as a regular expression."""
    return re.sub(r"<\w+>", "[^/]+", re.escape(name).replace(r"\<", "<").replace(r"\>", ">"))


def _documented(key: str) -> bool:
    return any(re.fullmatch(_pattern(name), key) for name in _ROWS)


@pytest.fixture(scope="module")
def emitted(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, letters: Any) -> set[str]:
    """Every key that a run of two steps with a warm start and a KL penalty writes."""
    output = tmp_path_factory.mktemp("runs")
    agentrl.train(
        {
            "name": "run",
            "steps": 2,
            "output": str(output),
            "environment": {"id": f"{letters.__module__}:{letters.__name__}"},
            "model": {"path": str(tiny_checkpoint)},
            "warm_start": {"episodes": 4, "steps": 2, "episodes_per_step": 2, "probe_every": 1},
            "rollout": {
                "tasks_per_step": 3,
                "group_size": 4,
                "max_turn_tokens": 6,
                "max_episode_tokens": 512,
            },
            "lora": {"r": 2},
            "algorithm": {"kl": 0.01},  # has every step make an update
            "evaluation": {"tasks": 3, "samples": 2, "k": [1, 2], "every": 1, "curve_tasks": 2},
            "log": {"trackers": []},
        }
    )
    rows = read_rows(RunFolder(output / "run"))
    assert {row["phase"] for row in rows} == {"warm_start", "train", "evaluation"}
    return {key for row in rows for key in row} - {"phase", "step"}


def test_every_metric_of_a_run_stands_in_the_table(emitted: set[str]) -> None:
    assert sorted(key for key in emitted if not _documented(key)) == []


def test_every_metric_of_the_table_is_written_or_says_when_it_is(emitted: set[str]) -> None:
    missing = {name for name in _ROWS if not any(re.fullmatch(_pattern(name), key) for key in emitted)}
    assert sorted(name for name in missing if "*only*" not in _ROWS[name][2]) == []


def test_every_row_of_the_table_is_complete_and_every_metric_stands_in_one() -> None:
    assert all(len(cells) == 5 and all(cells) for cells in _CELLS), _CELLS
    names = [name for cells in _CELLS[2:] for name in re.findall(r"`([^`]+)`", cells[0])]
    assert len(names) == len(set(names))
    assert len(names) > 40


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_the_limit_of_every_alarm_stands_in_the_table(rule: Rule) -> None:
    sign, beginning = "≥" if rule.side == "above" else "≤", " x its beginning" if rule.relative else ""
    normal = _ROWS[rule.key][3]
    assert "**alarm**" in normal
    assert f"{sign} {rule.limit:g}{beginning}, {rule.steps} step" in normal


@pytest.mark.parametrize("text", [_SECTION, *(rule.hint for rule in RULES)])
def test_every_setting_that_is_named_exists(text: str) -> None:
    for section, setting in re.findall(r"\b(algorithm|optimizer|rollout|model)\.(\w+)", text):
        assert setting in RunConfig.model_fields[section].annotation.model_fields  # type: ignore[union-attr]
