"""A finished run, read back: tables, curve, transcripts."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console, RenderableType

from agentrl.errors import BadData, UnknownName
from agentrl.log import Display, Row, RunFolder
from agentrl.show import (
    evaluation_table,
    find_run,
    metrics_table,
    plot_curve,
    show_run,
    sparkline,
    summary_table,
)

_SUMMARY = {
    "before": {"pass@1": {"value": 0.25, "low": 0.2, "high": 0.3}, "tasks": 500, "return": 0.25},
    "after": {
        "pass@1": {"value": 0.9, "low": 0.88, "high": 0.92},
        "pass@8": {"value": 1.0, "low": 0.99, "high": 1},
    },
    "gain": {"pass@1": {"value": 0.65, "low": 0.6, "high": 0.7}},
    "tasks": 500,
}
_EPISODE: dict[str, Any] = {
    "task_id": "t1",
    "reward": 1.0,
    "valid": True,
    "fault": "",
    "score": {"value": 1.0, "parts": {}, "note": "right [answer]"},
    "stop_reason": "answered",
    "messages": [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "[bold]two\x1b[2J"}],
}


def _rows() -> list[Row]:
    rows: list[Row] = [{"phase": "warm_start", "step": 1, "warm_start/loss": 3.0}]
    rows += [{"phase": "train", "step": step, "reward/mean": step / 10} for step in range(1, 11)]
    rows[5]["reward/mean"] = None
    rows.append({"phase": "evaluation", "step": 0, "eval/pass@1": 0.3})
    interval = {"eval/pass@1": 0.9, "eval/pass@1_low": 0.85, "eval/pass@1_high": 0.95}
    return [*rows, {"phase": "evaluation", "step": 10, **interval}]


def _text(renderable: RenderableType) -> str:
    seen = io.StringIO()
    Console(file=seen, width=120).print(renderable)
    return seen.getvalue()


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "runs" / "mine")
    folder.trajectories.mkdir(parents=True)
    folder.config.write_text("name: mine\n")
    folder.metrics.write_text("".join(json.dumps(row) + "\n" for row in _rows()))
    folder.summary.write_text(json.dumps(_SUMMARY))
    folder.transcripts(1).write_text(json.dumps(_EPISODE | {"task_id": "old"}) + "\n")
    folder.transcripts(10).write_text(json.dumps(_EPISODE) + "\n")
    return folder


def _shown(folder: RunFolder, transcripts: int = 2) -> str:
    seen = io.StringIO()
    show_run(folder, Display(Console(file=seen, width=120)), transcripts=transcripts)
    return seen.getvalue()


def test_a_run_is_found_by_folder_and_by_name(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_run(str(run.root)) == run
    monkeypatch.chdir(run.root.parent.parent)
    assert find_run("mine").config.is_file()
    with pytest.raises(UnknownName, match="no run 'mien'; did you mean 'mine'?"):
        find_run("mien")
    with pytest.raises(UnknownName, match="there are mine in runs/"):
        find_run("quickstart")


def test_a_run_shows_its_results_its_metrics_and_its_last_episodes_first(run: RunFolder) -> None:
    shown = _shown(run)
    assert "0.250 [0.200, 0.300]" in shown
    assert "reward/mean" in shown
    assert shown.index("step 10, task t1") < shown.index("step 1, task old")


def test_a_policy_can_neither_steer_the_terminal_nor_the_markup(run: RunFolder) -> None:
    shown = _shown(run, transcripts=1)
    assert "[bold]two\\x1b[2J" in shown
    assert "right [answer]" in shown
    assert "task old" not in shown


def test_a_run_without_steps_says_so(run: RunFolder) -> None:
    for path in (run.metrics, run.summary, run.transcripts(1), run.transcripts(10)):
        path.unlink()
    assert _shown(run) == "no step is finished yet\n"


def test_the_summary_stands_before_beside_after_and_leaves_gaps() -> None:
    text = _text(summary_table(_SUMMARY))
    assert "on 500 held-out tasks" in text
    assert "+0.650 [+0.600, +0.700]" in text
    assert next(line for line in text.splitlines() if "pass@8" in line).split()[1] == "-"
    assert "return" not in text


def test_an_evaluation_without_a_headline_shows_what_it_could_be() -> None:
    figures = {"pass@1": None, "bounds": {"pass@1": {"best": 0.75, "worst": 0.5}}}
    text = _text(evaluation_table(figures | {"tasks": 4, "samples": 2, "invalid": 0.25}, title="calculator"))
    assert "between 0.500 and 0.750" in text
    assert "25.0% of them invalid" in text


def test_metrics_show_first_last_and_course() -> None:
    line = next(line for line in _text(metrics_table(_rows())).splitlines() if "reward/mean" in line)
    assert [cell.strip() for cell in line.strip("│").split("│")] == ["reward/mean", "0.1", "1", "▁▂▃▃▅▆▆▇█"]


def test_on_a_narrow_terminal_the_course_gives_way_and_no_figure_does() -> None:
    key = "loss/a_metric_with_a_long_name_of_its_own"
    rows: list[Row] = [{"phase": "train", "step": step, key: 1.1934e-05 / step} for step in range(1, 41)]
    seen = io.StringIO()
    Console(file=seen, width=80).print(metrics_table(rows))
    (line,) = (line for line in seen.getvalue().splitlines() if "loss/" in line)
    name, first, last, course = (cell.strip() for cell in line.strip("│").split("│"))
    assert (name, first, last) == (key, "1.193e-05", "2.983e-07")
    assert course[0] == "█"


@pytest.mark.parametrize("text", ["", "{torn", "[]"])
def test_a_broken_file_of_a_run_is_named_with_its_line(run: RunFolder, text: str) -> None:
    with run.transcripts(1).open("a") as file:
        file.write(text or "{}")
    with pytest.raises(BadData, match=r"step_000001\.jsonl, line 2"):
        _shown(run)
    run.summary.write_text(text)
    with pytest.raises(BadData, match=r"summary\.json"):
        _shown(run)


def test_a_sparkline_is_as_wide_as_asked_for_and_flat_where_nothing_changes() -> None:
    assert sparkline([1, 2, 3, 4], width=2) == "▁█"
    assert sparkline([5.0, 5.0, 5.0]) == "▁▁▁"
    assert sparkline([]) == ""


@pytest.mark.parametrize("rows", [_rows(), []])
def test_the_curve_is_a_picture_also_of_no_rows(rows: list[Row], tmp_path: Path) -> None:
    plot_curve(rows, tmp_path / "curve.png", title="mine")
    picture = imread(tmp_path / "curve.png")
    assert picture.shape[0] > 400
    reddish = (np.abs(picture[..., :3] - np.array([0.76, 0.25, 0.05])) < 0.05).all(-1).any()
    assert reddish == bool(rows)
