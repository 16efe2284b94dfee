"""What a user can get wrong: one line with the value and the next step, and nothing is left behind."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from typer.testing import CliRunner, Result

from agentrl.cli import app

_RUN = "environment: {id: calculator}\nmodel: {tiny: {}}\n"
_ECHO = """\
import agentrl
from agentrl import Message, Task


class Echo(agentrl.ToolEnv):
    reward = "exact"
    words = {"train": ["yes"], "test": ["no"]}

    def tasks(self, split):
        return [Task(id=f"{split}-{w[:9]}", prompt=(Message("user", w),), truth={"answer": w})
                for w in self.words[split]]

    def gold(self, task):
        return [Message("assistant", task.truth["answer"])]


class Empty(Echo):
    words = {"train": ["yes"], "test": []}


class Long(Echo):
    words = {"train": ["yes", "yes " * 300], "test": ["no"]}
"""
_ROW = '{"question": "1 + 1?", "answer": "2"}\n'


def _edited(name: str, **values: Any) -> Callable[[Path], None]:
    """Sets keys of a JSON file in a model's folder; None removes one."""

    def edit(folder: Path) -> None:
        old = json.loads((folder / name).read_text())
        new = {key: value for key, value in (old | values).items() if value is not None}
        (folder / name).write_text(json.dumps(new))

    return edit


def _cut(name: str, size: int) -> Callable[[Path], None]:
    """Leaves the first ``size`` bytes of a file in a model's folder."""
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size]) and None


def _cleared(name: str) -> Callable[[Path], None]:
    """Leaves an empty object of a JSON file in a model's folder."""
    return lambda folder: (folder / name).write_text("{}") and None


def _without(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names] and None


def _without_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    _edited("tokenizer_config.json", chat_template=None)(folder)


def _without_end_of_turn(folder: Path) -> None:
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}{{ 'assistant: ' }}"
    (folder / "chat_template.jinja").write_text(template)


@dataclass(frozen=True)
class Case:
    """A command in a folder of its own, and what its error line must say."""

    command: str
    says: tuple[str, ...]
    files: Mapping[str, str | bytes] = field(default_factory=dict)
    model: Callable[[Path], None] | None = None  # spoils ./model, a copy of a good tiny one
    lines: int = 1


_AWAY = {
    "away.py": """\
from agentrl.sandbox import Limits, Survey, check_enforced

class Away:
    name = "away"
    def survey(self):
        return Survey(available=False, note="no such machine")
    def open(self, limits):
        check_enforced(self.name, self.survey(), limits)
    def sweep(self):
        return 0
    def close(self):
        pass
"""
}
_ECHO_FILE = {"echo_env.py": _ECHO}
_WRAPPED = _ECHO_FILE | {
    "wrapped.py": """\
import gymnasium
from echo_env import Echo


def limited():
    return gymnasium.wrappers.TimeLimit(Echo(), 2)
"""
}
_NO_WRAPPER = ("UserError: TimeLimit around Echo: rollouts run the environment itself", "max_turns")
_GOOD: Callable[[Path], None] = lambda folder: None  # noqa: E731

CASES: dict[str, Case] = {
    # -- configurations --
    "a file that is not there": Case(
        "train mine.yml",
        ("UnknownName", "no file 'mine.yml'", "did you mean 'mine.yaml'?"),
        {"mine.yaml": _RUN},
    ),
    "a packaged configuration misspelt as a file": Case(
        "train configs/quickstrat.yaml", ("no file 'configs/quickstrat.yaml'", "did you mean 'quickstart'?")
    ),
    "a misspelt environment": Case("train calculater", ("did you mean 'calculator'?", "agentrl list")),
    "nothing like it": Case(
        "train zzz", ("nothing called 'zzz'", "a packaged configuration", "agentrl list")
    ),
    "a folder": Case(
        "train ./runs_of", ("'./runs_of' is a folder", "runs_of/a.yaml"), {"runs_of/a.yaml": _RUN}
    ),
    "a Python file": Case("train echo_env.py", ("is Python", "echo_env.py:Name"), _ECHO_FILE),
    "broken YAML": Case(
        "train mine.yaml", ("BadConfig: mine.yaml, line 4: not YAML",), {"mine.yaml": _RUN + "steps: [1, 2\n"}
    ),
    "no text": Case("train mine.yaml", ("mine.yaml can't be read", "UTF-8"), {"mine.yaml": b"\xff\xfe\x00"}),
    "an unknown key": Case("train quickstart step=3", ("unknown key step", "did you mean 'steps'?")),
    "an unknown nested key": Case(
        "train mine.yaml",
        ("mine.yaml: unknown key rollout.group_sise", "did you mean 'rollout.group_size'?"),
        {"mine.yaml": _RUN + "rollout: {group_sise: 4}\n"},
    ),
    "a wrong type": Case("train quickstart steps=many", ("steps is 'many'; it must be a valid integer",)),
    "two faults, a line each": Case(
        "train quickstart steps=x seed=y", ("steps is 'x'", "seed is 'y'"), lines=2
    ),
    "a budget smaller than one sample": Case(
        "train quickstart batch.tokens_per_microbatch=100",
        ("batch.tokens_per_microbatch is 100", "at least rollout.max_episode_tokens, 128"),
    ),
    "no model": Case("train calculator", ("model is missing", "--model M")),
    # -- environments and rewards --
    "an unknown environment": Case(
        "check calculater",
        ("no environment named 'calculater'", "did you mean 'calculator'?", "'package.module:Name'"),
    ),
    "an unknown environment in a file": Case(
        "train mine.yaml",
        ("no environment named 'calculater'", "did you mean 'calculator'?"),
        {"mine.yaml": _RUN.replace("calculator", "calculater")},
    ),
    "an unknown environment to evaluate": Case(
        "eval calculater --model model", ("did you mean 'calculator'?",), model=_GOOD
    ),
    "an unknown reward": Case("check calculator reward=numerik", ("no reward named 'numerik'", "'numeric'")),
    "an argument of a wrong type": Case(
        "check calculator max_turns=many", ("max_turns='many'", "it must be of type", "int")
    ),
    "an argument of a wrong type to train with": Case(
        "train mine.yaml",
        ("environment 'calculator' has levels=1", "it must be of type Sequence[int]"),
        {"mine.yaml": _RUN.replace("calculator", "calculator, args: {levels: 1}")},
    ),
    "an unknown argument": Case("check calculator level=1", ("takes no 'level'", "did you mean 'levels'?")),
    "a module that is not there": Case(
        "check nosuch.module:Env",
        (
            "can't import the environment's module 'nosuch.module'",
            "No module named 'nosuch'",
            "working directory",
        ),
    ),
    "no module's name": Case("check :Env", ("'' is no module", "'package.module:Name'")),
    "an import that fails deep inside": Case(
        "check outer_env:Env",
        (
            "can't import the environment's module 'outer_env'",
            "No module named 'nosuchlib'",
            "inner_env.py, line 2",
        ),
        {"outer_env.py": "import inner_env\n", "inner_env.py": "import sys\nimport nosuchlib\n"},
    ),
    "a module that is no Python": Case(
        "check broken_env:Env", ("SyntaxError", "broken_env.py, line 1"), {"broken_env.py": "class Env(:\n"}
    ),
    "a module that exits when imported": Case(
        "check broken_env:Env",
        ("UnknownName", "it exits (3) when imported", "__main__"),
        {"broken_env.py": "raise SystemExit(3)\n"},
    ),
    "an environment without tasks": Case(
        "check broken_env:Empty",
        ("UserError: Empty has no tasks: define tasks(split)",),
        {"broken_env.py": "import agentrl\nclass Empty(agentrl.ToolEnv):\n    reward = 'exact'\n"},
    ),
    "an unknown parser for a model made on the spot": Case(
        "train quickstart model.parser=hermse", ("UnknownName", "'hermse'", "did you mean 'hermes'?")
    ),
    "a file that is no Python": Case(
        "check ./broken_env.py:Env",
        ("SyntaxError", "broken_env.py, line 1"),
        {"broken_env.py": "class Env(:\n"},
    ),
    "a misspelt file": Case(
        "check ./echo_en.py:Echo", ("no file", "did you mean 'echo_env.py'?"), _ECHO_FILE
    ),
    "a module without the attribute": Case(
        "check echo_env:Ecko",
        ("no environment 'Ecko' in echo_env", "did you mean 'Echo'?", "Echo, Empty, Long"),
        _ECHO_FILE,
    ),
    # -- data --
    "a broken line": Case(
        "check math dataset=rows.jsonl",
        ("BadData: rows.jsonl:2: not JSON", "mend or remove the line"),
        {"rows.jsonl": _ROW + '{"question": "1\n' + _ROW},
    ),
    "a line that is no text": Case(
        "check math dataset=rows.jsonl",
        ("rows.jsonl:2: not UTF-8", "byte 15"),
        {"rows.jsonl": _ROW.encode() + b'{"question": "\xff"}\n'},
    ),
    "a row that is no object": Case(
        "check math dataset=rows.jsonl", ("rows.jsonl:1: a list", "by name"), {"rows.jsonl": "[1]\n"}
    ),
    "a missing column": Case(
        "check math dataset=rows.jsonl",
        ("rows.jsonl:1: no text in the column 'answer' or 'solution'", "question_key and answer_key"),
        {"rows.jsonl": '{"question": "1 + 1?"}\n'},
    ),
    "an empty file": Case(
        "check math dataset=rows.jsonl",
        ("the split 'train' of rows.jsonl has no rows",),
        {"rows.jsonl": "\n"},
    ),
    "a data set that is not there": Case(
        "check math dataset=./nope", ("no data set './nope'", "gsm8k", "seen from")
    ),
    "a broken line to train on": Case(
        "train mine.yaml",
        ("data/train.jsonl:1: not JSON",),
        {
            "mine.yaml": _RUN.replace("calculator", "math, args: {dataset: data}"),
            "data/train.jsonl": "{\n",
            "data/test.jsonl": _ROW,
        },
    ),
    "a broken line to evaluate on": Case(
        "eval math dataset=data --model model",
        ("data/test.jsonl:1: not JSON",),
        {"data/test.jsonl": "{\n"},
        model=_GOOD,
    ),
    "a prompt longer than the context to evaluate with": Case(
        "eval echo_env:Long --model model --split train -n 1 --context 200",
        ("the opening of task 'train-yes yes y'", "the context is 200", "--context"),
        _ECHO_FILE,
        model=_GOOD,
    ),
    "an empty split": Case(
        "train echo_env:Empty --model model",
        ("the split 'test' of Empty has no tasks",),
        _ECHO_FILE,
        model=_GOOD,
    ),
    "an unknown split": Case(
        "eval calculator --model model --split tset", ("no split 'tset'", "did you mean 'test'?"), model=_GOOD
    ),
    "a prompt longer than the context": Case(
        "train echo_env:Long --model model rollout.max_episode_tokens=256",
        (
            "the prompt of task 'train-yes yes y'",
            "tokens, and rollout.max_episode_tokens is 256",
            "raise it above",
        ),
        _ECHO_FILE,
        model=_GOOD,
    ),
    # -- models --
    "a model folder that is not there": Case(
        "train calculator --model ./modle",
        ("no model folder './modle'", "did you mean 'model'?"),
        model=_GOOD,
    ),
    "a model folder that is not there, to evaluate": Case(
        "eval calculator --model ./modle", ("no model folder './modle'", "did you mean 'model'?"), model=_GOOD
    ),
    "a folder that is no model": Case(
        "eval calculator --model data", ("the model folder data has no config.json",), {"data/x.txt": "x"}
    ),
    "an adapter in place of a model": Case(
        "eval calculator --model data", ("is a LoRA adapter", "--adapter"), {"data/adapter_config.json": "{}"}
    ),
    "a model that is a file": Case("eval calculator --model x.txt", ("'x.txt' is a file",), {"x.txt": "x"}),
    "a folder without weights": Case(
        "train calculator --model model",
        ("the model folder model holds no weights",),
        model=_without("model.safetensors"),
    ),
    "torn weights": Case(
        "train calculator --model model",
        ("model/model.safetensors is torn", "again"),
        model=_cut("model.safetensors", 9000),
    ),
    "weights that are none": Case(
        "eval calculator --model model",
        ("model/model.safetensors is no safetensors file",),
        model=_cut("model.safetensors", 4),
    ),
    "a broken config.json": Case(
        "eval calculator --model model", ("model/config.json can't be read",), model=_cut("config.json", 40)
    ),
    "a broken tokenizer.json": Case(
        "train calculator --model model rollout.max_episode_tokens=512",
        ("model/tokenizer.json is torn",),
        model=_cut("tokenizer.json", 40),
    ),
    "a tokenizer.json that is something else": Case(
        "eval calculator --model model",
        ("no tokenizer could be loaded from 'model'",),
        model=_cleared("tokenizer.json"),
    ),
    "a hub id while offline": Case(
        "train calculator --model nobody/nothing-here",
        ("'nobody/nothing-here' is no folder", "the hub does not answer", "check the network"),
    ),
    "a hub id while offline, to evaluate": Case(
        "eval calculator --model nobody/nothing-here",
        ("'nobody/nothing-here' is no folder", "HF_HUB_OFFLINE"),
    ),
    "an adapter that is not there": Case(
        "eval calculator --model model --adapter nope -n 1 --tasks 1",
        ("BadData: nope holds no PEFT adapter", "adapter_config.json"),
        model=_GOOD,
    ),
    "an adapter whose config is broken": Case(
        "eval calculator --model model --adapter lora -n 1 --tasks 1",
        ("BadData: the adapter in lora can't be read", "JSONDecodeError", "adapter_config.json"),
        {"lora/adapter_config.json": "{", "lora/adapter_model.safetensors": "x"},
        model=_GOOD,
    ),
    "an adapter whose weights are torn": Case(
        "eval calculator --model model --adapter lora -n 1 --tasks 1",
        ("BadData: the adapter in lora can't be read", "SafetensorError"),
        {"lora/adapter_config.json": '{"peft_type": "LORA"}', "lora/adapter_model.safetensors": "x"},
        model=_GOOD,
    ),
    "greedy episodes that are all the same": Case(
        "eval calculator --model model --temperature 0 -n 4",
        ("n is 4, all the same with a temperature of 0",),
        model=_GOOD,
    ),
    "a config.json with a value of a wrong type": Case(
        "eval calculator --model model",
        ("could be loaded from 'model'", "vocab_size"),
        model=_edited("config.json", vocab_size="many"),
    ),
    "an unknown architecture": Case(
        "eval calculator --model model",
        ("no model could be loaded from 'model'", "nosuch"),
        model=_edited("config.json", model_type="nosuch"),
    ),
    "weights of another model": Case(
        "eval calculator --model model",
        ("the model 'model' lacks", "its weights"),
        model=_edited("config.json", num_hidden_layers=3, layer_types=None),
    ),
    "no tokenizer": Case(
        "train calculator --model model rollout.max_episode_tokens=512",
        ("no tokenizer could be loaded from 'model'",),
        model=_without("tokenizer.json", "tokenizer_config.json"),
    ),
    "no chat template": Case(
        "train calculator --model model rollout.max_episode_tokens=512",
        ("has no chat template", "instruction-tuned", "tokenizer_config.json"),
        model=_without_template,
    ),
    "no chat template, to evaluate": Case(
        "eval calculator --model model",
        ("has no chat template", "chat_template.jinja"),
        model=_without_template,
    ),
    "no token that ends a turn": Case(
        "train calculator --model model rollout.max_episode_tokens=512",
        ("no token is special", "<|im_end|>"),
        model=_without_end_of_turn,
    ),
    "more tokens than embeddings": Case(
        "train calculator --model model rollout.max_episode_tokens=512",
        ("tokens without a row in the model's embeddings", "vocab_size is 300"),
        model=_edited("config.json", vocab_size=300),
    ),
    "a context beyond the model's": Case(
        "train calculator --model model rollout.max_episode_tokens=1024",
        ("rollout.max_episode_tokens is 1024", "reach 512 tokens", "lower it"),
        model=_GOOD,
    ),
    # -- the machine --
    "no memory for the cache": Case(
        "train quickstart engine.max_sequences=100000000",
        ("no memory", "MiB", "the largest part is cache: lower engine.max_sequences"),
    ),
    "no memory for the weights": Case(
        "train quickstart model.tiny.intermediate_size=1000000000 warm_start=null",
        ("no memory", "the largest part is weights: take a smaller model"),
    ),
    "an unknown tracker": Case(
        "train quickstart log.trackers=[tensorbord]",
        ("no tracker named 'tensorbord'", "did you mean 'tensorboard'?"),
    ),
    "an output folder that can't be": Case(
        "train quickstart output=file/runs",
        ("can't write in file/runs/quickstart", "Not a directory", "set output to a folder"),
        {"file": "a file\n"},
    ),
    "a report that can't be written": Case(
        "eval calculator --model model --json file/report.json",
        ("can't write in file", "set --json to"),
        {"file": "a file\n"},
        model=_GOOD,
    ),
    "a report that is a folder": Case(
        "eval calculator --model model --json folder",
        ("--json names folder, a folder", "folder/report.json"),
        {"folder/a": ""},
        model=_GOOD,
    ),
    "a bench's report that can't be written": Case(
        "bench quickstart --json /proc/x/y", ("can't write in /proc/x", "set --json to")
    ),
    "a trace that can't be written": Case(
        "bench quickstart --profile /proc/x/y", ("can't write in /proc/x", "set --profile to")
    ),
    "a self-check's report that can't be written": Case(
        "sandbox selfcheck --backend process --json /proc/x/y", ("can't write in /proc/x", "set --json to")
    ),
    "a broken summary": Case(
        "show run",
        ("BadData", "run/summary.json is not JSON"),
        {"run/config.yaml": "name: run\n", "run/summary.json": ""},
    ),
    "a check of the self-check that there is none of": Case(
        "sandbox selfcheck --backend process --only nope",
        ("nothing of the self-check has the name or the group nope", "the groups are", "--adversarial"),
    ),
    # -- sandboxes and wrappers --
    "an unknown sandbox": Case(
        "check python_tool sandbox=nope", ("no sandbox named 'nope'", "there are bubblewrap, docker")
    ),
    "a sandbox that the host has not": Case(
        "check code sandbox=away.py:Away",
        ("the sandbox 'away' is not available here: no such machine",),
        _AWAY,
    ),
    "a sandbox of tools that the host has not": Case(
        "check workspace sandbox=away.py:Away", ("not available here: no such machine",), _AWAY
    ),
    "an evaluation in a sandbox that the host has not": Case(
        "eval code sandbox=away.py:Away --model model",
        ("not available here: no such machine",),
        _AWAY,
        model=_GOOD,
    ),
    "a run in a sandbox that the host has not": Case(
        "train code environment.args.sandbox=away.py:Away --model model",
        ("not available here: no such machine",),
        _AWAY,
        model=_GOOD,
    ),
    "an unknown sandbox of programs": Case(
        "eval code sandbox=dokcer --model model", ("no sandbox named 'dokcer'", "'docker'"), model=_GOOD
    ),
    "a wrapped environment to check": Case("check wrapped.py:limited", _NO_WRAPPER, _WRAPPED),
    "a wrapped environment to evaluate": Case(
        "eval wrapped.py:limited --model model", _NO_WRAPPER, _WRAPPED, model=_GOOD
    ),
    "a wrapped environment to train on": Case(
        "train wrapped.py:limited --model model", _NO_WRAPPER, _WRAPPED, model=_GOOD
    ),
    # -- names --
    "a file with the name of a module of Python's": Case(
        "check code:Shop",
        ("no environment 'Shop' in code (/", "write './code.py:Shop'"),
        {"code.py": "Shop = 1"},
    ),
    "a file of data that is not there": Case(
        "check math dataset=d/nope.jsonl", ("BadData: no such file: d/nope.jsonl", "seen from")
    ),
    "a file whose name is no run's": Case(
        "train './my run.yaml'", ("name is 'my run'", "set name=..."), {"my run.yaml": _RUN}
    ),
    "a layer that the model does not have": Case(
        "train calculator --model model rollout.max_episode_tokens=512 lora.target_modules=[q_prj]",
        ("lora.target_modules has 'q_prj'", "did you mean 'q_proj'?"),
        model=_GOOD,
    ),
    "a layer that no tiny model has": Case(
        "train quickstart lora.target_modules=[q_prj]",
        ("lora.target_modules has 'q_prj'", "did you mean 'q_proj'?"),
    ),
}


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working folder, off the network; what is imported from it is forgotten again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    yield tmp_path
    for name in [name for name, module in sys.modules.items() if _lies_in(tmp_path, module)]:
        del sys.modules[name]


def _lies_in(folder: Path, module: Any) -> bool:
    return Path(getattr(module, "__file__", None) or "/").is_relative_to(folder)


def _agentrl(command: str) -> Result:
    return CliRunner().invoke(app, shlex.split(command), env={"COLUMNS": "200"})


def _contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in folder.rglob("*")
    }


@pytest.mark.parametrize("name", CASES)
def test_what_is_wrong_ends_as_one_line_and_leaves_nothing_behind(
    name: str, workplace: Path, tiny_checkpoint: Path
) -> None:
    case = CASES[name]
    for path, content in case.files.items():
        (workplace / path).parent.mkdir(parents=True, exist_ok=True)
        (workplace / path).write_bytes(content.encode() if isinstance(content, str) else content)
    if case.model is not None:
        shutil.copytree(tiny_checkpoint, workplace / "model")
        case.model(workplace / "model")
    before = _contents(workplace)
    result = _agentrl(case.command)
    assert result.exit_code == 2, (result.output, result.exception)
    assert "Traceback" not in result.output
    assert len(result.stderr.splitlines()) == case.lines, result.stderr
    for part in case.says:
        assert part in result.stderr
    assert _contents(workplace) == before
