"""The run's folder: rows, transcripts, summary, trackers, and what a terminal or a pipe sees."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import resource
from pathlib import Path

import pytest
from accelerate.tracking import TensorBoardTracker
from rich.console import Console

from agentrl.errors import BadConfig, BadData, CannotWrite, MissingExtra
from agentrl.log import (
    Display,
    RunFolder,
    RunLog,
    forget_evaluations,
    read_rows,
    transcript,
    truncate_after,
)
from agentrl.types import Completion, Group, Message, Score, Task, ToolCall, Trajectory, Turn

_CONFIG = "name: mine\nlora: {r: 4, target_modules: [a, b]}\n"


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "mine")


def _trajectory(task_id: str = "1+1", *, sibling: int = 0, valid: bool = True) -> Trajectory:
    call = ToolCall(id="c1", name="add", arguments={"a": 1}, raw="<add>", span=(0, 2))
    completion = Completion([5, 6], [-0.5, -0.25], [0, 0], "stop")
    return Trajectory(
        task_id=task_id,
        sibling=sibling,
        seed=7,
        turns=(Turn([1, 2, 3], completion, reward=1.0),),
        messages=(
            Message("user", "1 + 1 é"),
            Message("assistant", "", (call,)),
            Message("tool", "2", tool_call_id="c1"),
        ),
        stop_reason="answered",
        score=Score(1.0, {"right": 1.0}, "as the truth says") if valid else None,
        valid=valid,
        fault="" if valid else "tool",
        timings={"engine": 0.5},
    )


def _group(*trajectories: Trajectory) -> Group:
    return Group(Task(id=trajectories[0].task_id, prompt=()), trajectories)


def test_a_step_is_one_row_on_disk_at_once(folder: RunFolder) -> None:
    with RunLog(folder, config_text=_CONFIG) as log:
        log.step(3, {"loss/policy": -0.5}, phase="warm_start")
        log.step(1, {"reward/mean": 1, "loss/policy": math.nan})
        assert read_rows(folder) == [
            {"phase": "warm_start", "step": 3, "loss/policy": -0.5},
            {"phase": "train", "step": 1, "reward/mean": 1.0, "loss/policy": None},
        ]
    assert folder.config.read_text() == _CONFIG


def test_a_step_is_logged_once_and_steps_rise(folder: RunFolder) -> None:
    with RunLog(folder, config_text=_CONFIG) as log:
        log.step(2, {})
        log.step(2, {"eval/pass@1": 0.5}, phase="evaluation")
        for step in (2, 1):
            with pytest.raises(ValueError, match="written once"):
                log.step(step, {})


def test_a_log_that_is_not_open_writes_nothing(folder: RunFolder) -> None:
    log = RunLog(folder, config_text=_CONFIG)
    with pytest.raises(RuntimeError, match="with block"):
        log.step(1, {})
    with log:
        pass
    with pytest.raises(RuntimeError, match="with block"):
        log.step(1, {})


def test_a_new_run_refuses_the_folder_of_another(folder: RunFolder) -> None:
    with RunLog(folder, config_text=_CONFIG) as log:
        log.step(1, {})
    with pytest.raises(BadConfig, match="--resume, choose another name"), RunLog(folder, config_text=_CONFIG):
        pass


def test_a_checkpoint_alone_makes_a_folder_that_of_a_run(folder: RunFolder) -> None:
    (folder.checkpoints / "step_000001").mkdir(parents=True)
    with pytest.raises(BadConfig, match="holds a run"), RunLog(folder, config_text=_CONFIG):
        pass


def test_a_run_that_was_stopped_before_its_first_step_begins_anew(folder: RunFolder) -> None:
    for _ in range(2):
        with RunLog(folder, config_text=_CONFIG) as log:
            assert not folder.base.exists()
            log.step(1, {"warm_start/loss": 2.0}, phase="warm_start")
        folder.base.mkdir()
        (folder.root / "notes.txt").write_text("mine")
    assert len(read_rows(folder)) == 1
    assert (folder.root / "notes.txt").exists()


def test_a_resumed_run_keeps_the_base_that_it_made(folder: RunFolder) -> None:
    folder.base.mkdir(parents=True)
    with RunLog(folder, config_text=_CONFIG, resume_after=0):
        assert folder.base.exists()


def test_a_resumed_run_forgets_what_came_after_its_checkpoint(folder: RunFolder) -> None:
    with RunLog(folder, config_text=_CONFIG, transcripts=1) as log:
        log.step(9, {"warm_start/loss": 1.0}, phase="warm_start")
        for step in (1, 2, 3):
            log.step(step, {"reward/mean": step})
            log.step(step, {"eval/pass@1": 0.5}, phase="evaluation")
            log.transcripts(step, [_group(_trajectory())])
        log.summary({"tasks": 3})
    with RunLog(folder, config_text=_CONFIG, resume_after=2) as log:
        log.step(3, {"reward/mean": 30})
    rows = read_rows(folder)
    assert [row["step"] for row in rows if row["phase"] == "warm_start"] == [9]
    assert [row["step"] for row in rows if row["phase"] == "evaluation"] == [1, 2]
    assert [row["reward/mean"] for row in rows if row["phase"] == "train"] == [1, 2, 30]
    assert sorted(path.name for path in folder.trajectories.iterdir()) == [
        "step_000001.jsonl",
        "step_000002.jsonl",
    ]
    assert not folder.summary.exists()


def test_a_resumed_run_knows_the_rows_that_were_written(folder: RunFolder) -> None:
    with RunLog(folder, config_text=_CONFIG) as log:
        assert not log.has(0, phase="evaluation")
        log.step(0, {}, phase="evaluation")
        log.step(1, {})
        log.step(2, {})
    with RunLog(folder, config_text=_CONFIG, resume_after=1) as log:
        assert log.has(0, phase="evaluation")
        assert log.has(1, phase="train")
        assert not log.has(2, phase="train")
        with pytest.raises(ValueError, match="written once"):
            log.step(1, {})


def test_a_row_that_the_disk_refuses_is_one_clear_error_and_is_cut_off_later(folder: RunFolder) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with RunLog(folder, config_text=_CONFIG) as log:
        log.step(1, {"reward/mean": 1.0})
        size = folder.metrics.stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, hard))
        try:
            with pytest.raises(CannotWrite, match=r"metrics.jsonl could not be written: File too large"):
                log.step(2, {"reward/mean": 1.0})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert folder.metrics.stat().st_size == size + 10
    with RunLog(folder, config_text=_CONFIG, resume_after=1) as log:
        log.step(2, {"reward/mean": 0.5})
    assert [row["reward/mean"] for row in read_rows(folder)] == [1.0, 0.5]


def test_a_folder_that_can_not_be_made_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "runs").touch()
    broken = RunLog(RunFolder(tmp_path / "runs" / "mine"), config_text=_CONFIG)
    with pytest.raises(CannotWrite, match="runs/mine could not be written: Not a directory"), broken:
        pass


def test_a_row_that_a_kill_cut_off_is_left_out(folder: RunFolder) -> None:
    folder.root.mkdir()
    folder.metrics.write_text('{"phase": "train", "step": 1}\n{"phase": "tra')
    assert [row["step"] for row in read_rows(folder)] == [1]
    truncate_after(folder, 1)
    assert folder.metrics.read_text() == '{"phase": "train", "step": 1}\n'


@pytest.mark.parametrize("line", ["not json", "[1]"])
def test_a_damaged_row_is_refused_with_its_line(folder: RunFolder, line: str) -> None:
    folder.root.mkdir()
    folder.metrics.write_text(f'{{"phase": "train", "step": 1}}\n{line}\n')
    with pytest.raises(BadData, match="line 2"):
        read_rows(folder)


def test_a_folder_without_rows_has_none(folder: RunFolder) -> None:
    assert read_rows(folder) == []


def test_transcripts_are_of_different_tasks_and_as_many_as_asked_for(folder: RunFolder) -> None:
    groups = [
        _group(*(_trajectory(task, sibling=sibling) for sibling in range(2))) for task in ("a", "b", "c")
    ]
    with RunLog(folder, config_text=_CONFIG, transcripts=2) as log:
        log.transcripts(12, groups)
    episodes = [json.loads(line) for line in folder.transcripts(12).read_text().splitlines()]
    assert [(episode["task_id"], episode["sibling"]) for episode in episodes] == [("a", 0), ("b", 0)]
    assert folder.transcripts(12).name == "step_000012.jsonl"


def test_lone_surrogates_end_no_run(folder: RunFolder) -> None:
    call = ToolCall(id="c1", name="add", arguments={"a": "\ud800"}, raw="<add>", span=(0, 2))
    said = (Message("user", "?"), Message("assistant", "\ud800", (call,)))
    score = Score(0.0, {}, "RE: ValueError: \ud800")
    episode = dataclasses.replace(_trajectory(), messages=said, score=score)
    with RunLog(folder, config_text=_CONFIG, transcripts=1) as log:
        log.transcripts(1, [_group(episode)])
    (line,) = folder.transcripts(1).read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["score"]["note"] == "RE: ValueError: ?"


def test_a_log_that_wants_no_transcripts_writes_no_file(folder: RunFolder) -> None:
    with RunLog(folder, config_text=_CONFIG, transcripts=0) as log:
        log.transcripts(1, [_group(_trajectory())])
    assert list(folder.trajectories.iterdir()) == []


def test_a_transcript_is_json_that_says_what_was_said_and_what_it_was_worth() -> None:
    episode = json.loads(json.dumps(transcript(_trajectory())))
    assert (episode["reward"], episode["score"]["parts"], episode["stop_reason"]) == (
        1.0,
        {"right": 1.0},
        "answered",
    )
    assert episode["turns"][0]["sampled_tokens"] == 2
    assert [message["role"] for message in episode["messages"]] == ["user", "assistant", "tool"]
    assert episode["messages"][1]["tool_calls"][0]["arguments"] == {"a": 1}


def test_an_invalid_episode_has_no_score_but_a_fault() -> None:
    episode = transcript(_trajectory(valid=False))
    assert (episode["valid"], episode["score"], episode["fault"]) == (False, None, "tool")


def test_a_summary_replaces_the_last_one_whole(folder: RunFolder) -> None:
    with RunLog(folder, config_text=_CONFIG) as log:
        log.summary({"tasks": 1})
        log.summary({"tasks": 2, "before": {"pass@1": {"value": 0.5}}})
    assert json.loads(folder.summary.read_text()) == {"tasks": 2, "before": {"pass@1": {"value": 0.5}}}
    assert not list(folder.root.glob("*.partial"))


def test_what_was_measured_with_other_settings_is_forgotten(folder: RunFolder) -> None:
    with RunLog(folder, config_text=_CONFIG) as log:
        log.step(0, {"eval/pass@1": 0.5}, phase="evaluation")
        log.step(1, {"reward/mean": 1.0})
    folder.before.write_text("{}")
    forget_evaluations(folder)
    assert [row["phase"] for row in read_rows(folder)] == ["train"]
    assert not folder.before.exists()


def test_trackers_see_the_warm_start_and_the_training_on_one_axis(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    monkeypatch.setattr(TensorBoardTracker, "log", lambda self, values, step: seen.append(step))
    with RunLog(folder, config_text=_CONFIG, trackers=["tensorboard"]) as log:
        for step in (1, 2):
            log.step(step, {"loss/nll": 1.0}, phase="warm_start")
        log.step(0, {"eval/pass@1": 0.5}, phase="evaluation")
        log.step(1, {"reward/mean": 0.5})
    with RunLog(folder, config_text=_CONFIG, trackers=["tensorboard"], resume_after=1) as log:
        log.step(2, {"reward/mean": 0.5})
    assert seen == [1, 2, 2, 3, 4]


def test_tensorboard_events_lie_in_the_run(folder: RunFolder) -> None:
    with RunLog(folder, config_text=_CONFIG, trackers=["tensorboard"]) as log:
        log.step(1, {"reward/mean": 0.5})
    assert list((folder.root / "tensorboard").glob("events.out.tfevents.*"))


def test_an_unknown_tracker_and_one_that_is_not_installed_are_refused(folder: RunFolder) -> None:
    with pytest.raises(BadConfig, match="no tracker named 'tensorbord'; did you mean 'tensorboard'"):
        RunLog(folder, config_text=_CONFIG, trackers=["tensorbord"])
    with pytest.raises(MissingExtra, match="pip install"):
        RunLog(folder, config_text=_CONFIG, trackers=["dvclive"])
    assert not folder.root.exists()


def test_a_pipe_sees_notes_once_and_no_bars() -> None:
    seen = io.StringIO()
    with Display(Console(file=seen, force_terminal=False)) as display:
        with display.bar("steps", total=2) as bar:
            bar.advance(note="reward 0.5")
            display.note("evaluated [a, b]")
            bar.advance()
        display.note("x" * 200)
    assert seen.getvalue() == "evaluated [a, b]\n" + "x" * 200 + "\n"


def test_a_terminal_sees_the_bars_with_their_notes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")  # a dumb one sees no bars
    seen = io.StringIO()
    console = Console(file=seen, force_terminal=True, width=120)
    with Display(console) as display, display.bar("steps", total=2) as bar:
        bar.advance(note="reward 0.5")
        with display.bar("evaluation", total=7):  # a new bar draws all of them anew
            pass
    for part in ("steps", "1/2", "reward 0.5", "evaluation", "0/7"):
        assert part in seen.getvalue()
