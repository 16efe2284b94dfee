"""Configuration files, overrides and targets; each fault is a line that says what is allowed."""

from __future__ import annotations

from pathlib import Path

import pytest

from agentrl.config import EngineConfig, RunConfig
from agentrl.configfile import (
    load_config,
    load_engine,
    packaged_configs,
    parse_assignments,
    resolve_target,
)
from agentrl.errors import BadConfig, UnknownName

_TEXT = """\
# agentrl train mine.yaml
environment: {id: calculator}
model: {tiny: {layers: 2}}
optimizer: {learning_rate: 2e-3}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(_TEXT)
    return path


def _fault(source: Path, *overrides: str) -> str:
    with pytest.raises(BadConfig) as caught:
        load_config(source, overrides)
    return str(caught.value).removeprefix(f"{source}: ")


def test_a_file_gives_its_values_and_its_stem_as_the_name(file: Path) -> None:
    config = load_config(str(file))
    assert (config.name, config.model.tiny and config.model.tiny.layers) == ("mine", 2)


def test_a_number_may_be_written_without_a_dot(file: Path) -> None:
    config = load_config(file, ["algorithm.kl=1e-3", "lora.alpha=3E1"])
    assert (config.optimizer.learning_rate, config.algorithm.kl, config.lora.alpha) == (0.002, 0.001, 30.0)


def test_overrides_reach_sections_that_the_file_does_not_name(file: Path) -> None:
    config = load_config(
        file, ["evaluation.k=[1, 2]", "warm_start.episodes=64", "warm_start.steps=3", "name=other"]
    )
    assert (config.evaluation.k, config.name) == ((1, 2), "other")
    assert config.warm_start is not None
    assert config.warm_start.episodes == 64


def test_null_takes_the_default_except_in_the_environments_arguments(file: Path) -> None:
    config = load_config(
        file, ["optimizer.learning_rate=null", "environment.args.limit=null", "warm_start.until="]
    )
    assert config.optimizer == load_config({"environment": {"id": "x"}, "model": {"path": "m"}}).optimizer
    assert config.environment.args == {"limit": None}
    assert config.warm_start is None


def test_an_engine_that_is_named_by_its_kind_alone_can_still_be_set(file: Path) -> None:
    for overrides in (["engine=vllm"], ["engine.kind=vllm"]):
        settings = [*overrides, "engine.args.quantization=null", "engine.max_sequences=8"]
        engine = load_config(file, settings).engine
        assert (engine.kind, engine.args, engine.max_sequences) == ("vllm", {"quantization": None}, 8)
    file.write_text(_TEXT + "engine: vllm\n")
    assert load_config(file, ["engine.args.block_size=32"]).engine.args == {"block_size": 32}


def test_an_environment_gives_a_default_run_called_after_it() -> None:
    config = load_config("my_package.shop:Shop", model="some/model")
    assert (config.environment.id, config.model.path, config.name) == (
        "my_package.shop:Shop",
        "some/model",
        "Shop",
    )


def test_a_model_replaces_the_tiny_one_and_keeps_what_is_set_beside(file: Path) -> None:
    config = load_config(file, ["model.parser=hermes"], model="some/model")
    assert (config.model.path, config.model.tiny, config.model.parser) == ("some/model", None, "hermes")


def test_a_mapping_is_not_changed_by_overrides() -> None:
    values = {"environment": {"id": "calculator"}, "model": {"path": "m"}}
    assert load_config(values, ["environment.args.level=3"]).environment.args == {"level": 3}
    assert values == {"environment": {"id": "calculator"}, "model": {"path": "m"}}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimiser.learning_rate=1", "unknown key optimiser; did you mean 'optimizer'?"),
        (
            "optimizer.learning_rat=1",
            "unknown key optimizer.learning_rat; did you mean 'optimizer.learning_rate'?",
        ),
        ("group_size=4", "unknown key group_size; did you mean 'rollout.group_size'?"),
        ("checkpoint.xyz=4", "unknown key checkpoint.xyz; known are checkpoint.every, checkpoint.keep"),
        ("rollout.group_size=x", "rollout.group_size is 'x'; it must be a valid integer"),
        ("rollout.group_size=0", "rollout.group_size is 0; it must be greater than or equal to 1"),
        ("optimizer.learning_rate=.inf", "optimizer.learning_rate is inf; it must be a finite number"),
        (
            "optimizer.schedule=step",
            "optimizer.schedule is 'step'; it must be 'linear', 'cosine' or 'constant'",
        ),
        ("optimizer.betas=[0.9]", "optimizer.betas is [0.9]; it must have more items"),
        ("lora.target_modules=3", "lora.target_modules is 3; it must be 'all-linear' or be a list"),
        ("log.trackers=wandb", "log.trackers is 'wandb'; it must be a list"),
        ("evaluation.k=[1, 9]", "evaluation.k is [1, 9]; each must be at most samples, 4"),
        ("checkpoint=3", "checkpoint is 3; it must be a mapping with keys of every, keep"),
        ("model.path=m", "model.path and tiny are both set; it must be one of them, or pass --model M"),
        ("warm_start.episodes=40", "warm_start.steps is missing: it has no default"),
        ("evaluation.curve_tasks=9", "evaluation.curve_tasks has no effect with every: 0: remove it"),
        ("engine=vlm", "engine.kind is 'vlm'; it must be 'embedded', 'vllm' or 'openai'"),
        ("engine.kind=openai", "engine.url is missing: kind: openai needs it, such as http://127.0.0.1"),
        ("engine.url=http://h/v1", "engine.url has no effect with kind: embedded: remove it"),
    ],
)
def test_a_fault_names_the_key_the_value_and_what_is_allowed(file: Path, override: str, message: str) -> None:
    assert _fault(file, override).startswith(message)


def test_each_fault_has_a_line_of_its_own(file: Path) -> None:
    lines = _fault(file, "steps=x", "seed=y").splitlines()
    assert [line.removeprefix(f"{file}: ").partition(" ")[0] for line in lines] == ["seed", "steps"]


def test_a_list_without_its_bad_items_is_no_second_fault(file: Path) -> None:
    assert _fault(file, "evaluation.k=[0]") == "evaluation.k is 0; it must be greater than or equal to 1"
    assert _fault(file, "evaluation.k=[]") == "evaluation.k is []; it must have at least 1 item, not 0"


def test_a_model_that_nobody_named_is_asked_for() -> None:
    with pytest.raises(BadConfig, match=r"calculator: model is missing: .* or pass --model M"):
        load_config("calculator")


def test_an_engine_alone_is_its_kind_and_its_keys() -> None:
    engine = load_engine(["openai", "url=http://h/v1", "request_retries=2"])
    assert (engine.kind, engine.url, engine.request_retries) == ("openai", "http://h/v1", 2)
    assert load_engine([]) == EngineConfig()
    passed_on = load_engine(["kind=vllm", "args.quantization=", "max_sequences=3"])
    assert (passed_on.args, passed_on.max_sequences) == ({"quantization": None}, 3)


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["vlm"], "--engine: engine.kind is 'vlm'; it must be 'embedded', 'vllm' or 'openai'"),
        (["openai"], "--engine: engine.url is missing: kind: openai needs it"),
        (["openai", "urll=http://h/v1"], "--engine: unknown key engine.urll; did you mean 'engine.url'?"),
        (["url=http://h/v1"], "--engine: engine.url has no effect with kind: embedded: remove it"),
        (["max_sequences=0"], "--engine: engine.max_sequences is 0; it must be greater than or equal to 1"),
        (["openai", "vllm"], "kind is set twice: remove one"),
        (["vllm", "args={"], "'args={', line 1: not YAML"),
    ],
)
def test_a_fault_of_an_engine_alone_names_its_key(assignments: list[str], message: str) -> None:
    with pytest.raises(BadConfig) as caught:
        load_engine(assignments)
    assert str(caught.value).splitlines()[0].startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: [1, 2\nseed: 1\n", r"line 2: not YAML: expected ',' or '\]'"),
        ("steps: 1\nseed: 1\nsteps: 2\n", "line 3: not YAML: 'steps' stands twice"),
        ("[1]: 2\n", "line 1: not YAML: a key must be a plain text"),
        ("just words\n", "holds str; it must be a mapping"),
        ("", "holds NoneType; it must be a mapping"),
        ("a: !!python/object:os.system 1\n", "could not determine a constructor"),
        ("a: 2023-02-29\n", "day is out of range for month; put it in quotes where a text is meant"),
        ("a: \x00", "not YAML: unacceptable character #x0000: special .* allowed in .* position 3$"),
    ],
)
def test_malformed_yaml_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(BadConfig, match=message):
        load_config(path)


def test_a_file_that_is_no_text_or_not_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "bytes.yaml", tmp_path / "missing.yaml", tmp_path):
        with pytest.raises(BadConfig, match="can't be read"):
            load_config(path)


def test_assignments_are_yaml() -> None:
    values = parse_assignments(["a.b=[1, x]", "c=", "d=text with = inside", "e=true"])
    assert values == {"a.b": [1, "x"], "c": None, "d": "text with = inside", "e": True}


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["a"], "'a' is no setting"),
        (["=3"], "'=3' is no setting"),
        (["a=1", "a=2"], "a is set twice"),
        (["a=["], "YAML"),
    ],
)
def test_what_is_no_assignment_is_refused(assignments: list[str], message: str) -> None:
    with pytest.raises(BadConfig, match=message):
        parse_assignments(assignments)


def test_a_key_below_a_plain_value_is_refused(file: Path) -> None:
    with pytest.raises(BadConfig, match=r"environment\.id\.x can't be set: environment\.id is 'calculator'"):
        load_config(file, ["environment.id.x=1"])


def test_a_target_is_a_file_a_packaged_configuration_or_an_environment(file: Path) -> None:
    assert resolve_target(str(file)) == ("config", file)
    assert resolve_target("calculator") == ("environment", "calculator")
    assert resolve_target("package.module:Name") == ("environment", "package.module:Name")
    for name, path in packaged_configs().items():
        assert resolve_target(name) == ("config", path)


def test_a_target_that_could_be_two_things_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "calculator").write_text(_TEXT)
    with pytest.raises(BadConfig, match=r"'calculator' is ambiguous: .* write \./calculator for the file"):
        resolve_target("calculator")
    assert resolve_target("./calculator") == ("config", Path("./calculator"))


def test_a_target_that_is_nothing_gets_a_suggestion() -> None:
    with pytest.raises(UnknownName, match="nothing called 'calculater'; did you mean 'calculator'?"):
        load_config("calculater")


def test_every_packaged_configuration_is_valid_short_and_begins_with_its_command() -> None:
    assert "quickstart" in packaged_configs()
    for name, path in packaged_configs().items():
        lines = path.read_text().splitlines()
        assert isinstance(load_config(name), RunConfig)
        assert len(lines) <= 40
        assert lines[0].startswith(f"# agentrl train configs/{path.name}")
