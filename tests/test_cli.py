"""The command line: what is handed on, what is printed, and how faults end."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import socket
import sys
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import pytest
from typer.testing import CliRunner, Result

from agentrl.cli import app
from agentrl.config import EngineConfig
from agentrl.configfile import load_config
from agentrl.errors import BadData, Diverged, EngineError, WrongWeights

_UNSOUND = """\
from agentrl.tool_env import ToolEnv
from agentrl.types import Message, Task


class Unsound(ToolEnv):
    splits = ("train",)

    def tasks(self, split):
        return [Task(id="a", prompt=(Message("user", "say yes"),))]

    def gold(self, task):
        return (Message("assistant", "yes"),)

    def reward(self, evidence):
        return 0.0
"""


def _agentrl(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


class Recorder:
    """Stands in for a command's function and remembers what it was called with."""

    def __init__(self, answer: Any = None) -> None:
        self.answer = answer
        self.called: tuple[tuple[Any, ...], dict[str, Any]] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.called = (args, kwargs)
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer


class FakeEvaluation:
    """An evaluation's figures."""

    def to_json(self) -> dict[str, Any]:
        estimate = {"value": 0.5, "low": 0.25, "high": 0.75}
        return {"pass@1": estimate, "return": 0.5, "tasks": 3, "samples": 2, "invalid": 0.0}


def _stand_in(monkeypatch: pytest.MonkeyPatch, name: str, answer: Any = None) -> Recorder:
    recorder = Recorder(answer)
    module = {"train": "training", "evaluate": "evaluation"}.get(name, name)
    monkeypatch.setattr(importlib.import_module(f"agentrl.{module}"), name, recorder)
    return recorder


def test_train_hands_on_its_target_and_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    train = _stand_in(monkeypatch, "train", {})
    settings = ["steps=3", "optimizer.warmup_steps=1"]
    result = _agentrl("train", "quickstart", *settings, "--model", "m", "--resume", "--accept", "steps,batch")
    assert result.exit_code == 0, result.output
    config = load_config("quickstart", settings, model="m")
    assert train.called == ((config,), {"resume": True, "accept": ["steps", "batch"]})


def test_eval_prints_its_table_and_writes_its_report(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    evaluate = _stand_in(monkeypatch, "evaluate", FakeEvaluation())
    report = tmp_path / "new" / "report.json"
    command = (
        "eval",
        "calculator",
        "levels=[1]",
        "--model",
        tiny_checkpoint,
        "-n",
        2,
        "-k",
        "1,2",
        "--tasks",
        3,
        "--json",
        report,
    )
    result = _agentrl(*map(str, command))
    assert result.exit_code == 0, result.output
    assert "0.500 [0.250, 0.750]" in result.output
    assert json.loads(report.read_text())["tasks"] == 3
    assert evaluate.called is not None
    (env,), options = evaluate.called
    assert (env, options["k"], options["n"], options["args"]) == ("calculator", (1, 2), 2, {"levels": [1]})


class FakeFailure(FakeEvaluation):
    """What the world left of an evaluation; of ``figure``, pass@1."""

    def __init__(self, figure: Any) -> None:
        self._figure = figure

    def to_json(self) -> dict[str, Any]:
        bounds = {"pass@1": {"best": 1.0, "worst": 0.0}}
        said = "5 failed at the boundary 'sandbox', the last one, of task 'a', with: no engine"
        return super().to_json() | {
            "pass@1": self._figure,
            "invalid": 0.01,
            "bounds": bounds,
            "failure": said,
        }


def test_eval_says_why_episodes_were_lost_and_fails_where_no_figure_is_left(
    monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path
) -> None:
    figure = {"value": 0.5, "low": 0.25, "high": 0.75}
    for left, exit_code in ((figure, 0), (None, 1)):
        _stand_in(monkeypatch, "evaluate", FakeFailure(left))
        result = _agentrl("eval", "calculator", "--model", tiny_checkpoint)
        assert result.exit_code == exit_code, result.output
        assert "5 failed at the boundary 'sandbox'" in result.output
    assert result.stderr.startswith("TooManyInvalid: too many episodes are invalid for a figure: 5 failed")


def test_a_report_may_go_down_a_pipe(
    monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    _stand_in(monkeypatch, "evaluate", FakeEvaluation())
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        result = _agentrl("eval", "calculator", "--model", tiny_checkpoint, "--json", pipe)
        assert result.exit_code == 0, result.output
        assert json.loads(os.read(reader, 1 << 16))["tasks"] == 3
    finally:
        os.close(reader)
    assert pipe.is_fifo()


def test_eval_takes_the_engine_key_by_key(
    monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"  # the weights are where the server is
    shutil.copytree(tiny_checkpoint, elsewhere, ignore=shutil.ignore_patterns("*.safetensors"))
    evaluate = _stand_in(monkeypatch, "evaluate", FakeEvaluation())

    def engine(*settings: str, model: Path = tiny_checkpoint) -> EngineConfig:
        options = [word for setting in settings for word in ("--engine", setting)]
        result = _agentrl("eval", "calculator", "--model", model, *options)
        assert result.exit_code == 0, result.output
        assert evaluate.called is not None
        return cast(EngineConfig, evaluate.called[1]["engine"])

    assert engine() == EngineConfig()
    assert engine("vllm", "args.block_size=32") == EngineConfig(kind="vllm", args={"block_size": 32})
    url = "http://127.0.0.1:8000/v1"
    served = engine("openai", f"url={url}", "max_sequences=8", model=elsewhere)
    assert served == EngineConfig(kind="openai", url=url, max_sequences=8)


def test_greedy_is_one_episode_at_temperature_zero(
    monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path
) -> None:
    evaluate = _stand_in(monkeypatch, "evaluate", FakeEvaluation())
    assert _agentrl("eval", "calculator", "--model", tiny_checkpoint, "--greedy").exit_code == 0
    assert evaluate.called is not None
    assert (evaluate.called[1]["n"], evaluate.called[1]["sampling"].temperature) == (1, 0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--greedy", "-n", "4"), "BadConfig: -n and --temperature have no effect with --greedy"),
        (("--greedy", "--top-p", "0.9"), "BadConfig: --top-p and --top-k have no effect"),
        (("--temperature", "0", "--top-k", "5"), "BadConfig: --top-p and --top-k have no effect"),
        (("-k", "1,x"), "BadConfig: -k is '1,x'; it must be counts like 1,8"),
        (("--top-p", "0"), "BadConfig: top_p is 0.0; it must be above 0"),
        (("levels",), "BadConfig: 'levels' is no setting"),
        (("--engine", "openai"), "BadConfig: --engine: engine.url is missing: kind: openai needs it"),
        (("--engine", "urll=x"), "BadConfig: --engine: unknown key engine.urll; did you mean 'engine.url'?"),
        (("--engine", "vllm", "--model", "./nowhere"), "UnsupportedModel: no model folder './nowhere'"),
        (
            ("--engine", "openai", "--engine", "url=http://h/v1", "--model", "./nowhere"),
            "UnsupportedModel: no model folder './nowhere'",
        ),
    ],
)
def test_eval_refuses_what_does_not_fit(
    monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], message: str
) -> None:
    evaluate = _stand_in(monkeypatch, "evaluate", FakeEvaluation())
    result = _agentrl("eval", "calculator", "--model", "m", *options)
    assert (result.exit_code, evaluate.called) == (2, None)
    assert result.stderr.startswith(message)


def test_a_user_error_is_one_line_on_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    _stand_in(monkeypatch, "train", BadData("tasks.jsonl has no column 'answer'"))
    result = _agentrl("train", "quickstart")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "BadData: tasks.jsonl has no column 'answer'\n"


def test_a_server_that_can_not_be_reached_is_one_line_and_no_users_error(tiny_checkpoint: Path) -> None:
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens there, and nobody else can begin to
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        engine = ("--engine", "openai", "--engine", f"url={url}", "--engine", "request_retries=0")
        result = _agentrl("eval", "calculator", "--model", tiny_checkpoint, *engine)
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith(f"EngineError: {url}/completions failed in 1 attempt")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("kind", [EngineError, WrongWeights, Diverged])
def test_what_ends_a_run_and_is_no_bug_is_one_line_and_no_users_error(
    monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    _stand_in(monkeypatch, "train", kind("http://127.0.0.1:8000/v1 failed in 7 attempts"))
    result = _agentrl("train", "quickstart")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == f"{kind.__name__}: http://127.0.0.1:8000/v1 failed in 7 attempts\n"


def test_an_interrupt_ends_with_its_own_code(monkeypatch: pytest.MonkeyPatch) -> None:
    _stand_in(monkeypatch, "train", KeyboardInterrupt())
    result = _agentrl("train", "quickstart")
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    _stand_in(monkeypatch, "train", ZeroDivisionError("ours"))
    assert isinstance(_agentrl("train", "quickstart").exception, ZeroDivisionError)


def test_an_unknown_target_gets_a_suggestion() -> None:
    result = _agentrl("train", "calculater")
    assert result.exit_code == 2
    assert result.stderr.startswith("UnknownName: nothing called 'calculater'; did you mean 'calculator'?")


def test_check_passes_a_sound_environment() -> None:
    result = _agentrl("check", "calculator", "levels=[1]")
    assert result.exit_code == 0, result.output
    assert "passed" in result.output


def test_check_names_what_fell_and_ends_with_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "unsound_environment.py").write_text(_UNSOUND)
    result = _agentrl("check", "unsound_environment:Unsound")
    assert result.exit_code == 1, result.output
    fell = [line for line in result.output.splitlines() if "FELL" in line]
    assert any("gold scores the maximum" in line for line in fell)


def test_list_names_everything_that_can_be_named() -> None:
    lines = _agentrl("list").output.splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "environments",
        "rewards",
        "sandboxes",
        "configs",
    ]
    for line, name in zip(lines, ("calculator", "numeric", "zygote", "quickstart"), strict=True):
        assert name in line


def test_show_and_export_ask_for_a_run_that_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for command in (("show", "nope"), ("export", "nope", "--merge", "out")):
        result = _agentrl(*command)
        assert result.exit_code == 2
        assert result.stderr.startswith("UnknownName: no run 'nope'; there are none in runs/.")


def test_export_hands_on_the_runs_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export = _stand_in(monkeypatch, "export", 160)
    (tmp_path / "config.yaml").write_text("name: mine\n")
    assert _agentrl("export", tmp_path, "--merge", "out").output == "wrote out (step 160)\n"
    assert export.called is not None
    assert export.called[0] == (tmp_path, Path("out"))
