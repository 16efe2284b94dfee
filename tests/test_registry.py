"""Names: the catalogue, registration, entry points, modules and files; names that lead nowhere."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import pytest

import agentrl
from agentrl import registry
from agentrl.errors import UnknownName, UserError
from agentrl.reward import Evidence
from agentrl.tool_env import ToolEnv
from agentrl.types import Message, Task

SOURCE = """
from agentrl.tool_env import ToolEnv
from agentrl.types import Message, Task

def always(evidence):
    return 1.0

class Inner:
    class Deep(ToolEnv):
        reward = always

        def tasks(self, split):
            return [Task(id=split, prompt=(Message("user", "hi"),))]
"""


class Mine(ToolEnv):
    def __init__(self, *, size: int, colour: str = "red", **settings: Any) -> None:
        self.size, self.colour = size, colour
        super().__init__(**settings)

    def reward(self, evidence: Evidence) -> float:
        return 1.0

    def tasks(self, split: str) -> list[Task]:
        return [Task(id=split, prompt=(Message("user", "hi"),))]


@pytest.fixture(autouse=True)
def nothing_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {"environment": {}, "reward": {}, "sandbox": {}})


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = tmp_path / "registry_probe.py"
    path.write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    yield path
    sys.modules.pop("registry_probe", None)


def test_the_catalogue_is_made_by_name() -> None:
    env = agentrl.make("calculator", levels=[1], max_turns=3)
    assert type(env).__name__ == "Calculator"
    assert env.max_turns == 3  # type: ignore[attr-defined]


def test_a_registered_name_is_made_and_listed() -> None:
    agentrl.register("mine", Mine)
    agentrl.register("mine", Mine)
    assert agentrl.make("mine", size=3).size == 3  # type: ignore[attr-defined]
    assert "mine" in agentrl.list_environments()
    assert {"calculator", "math"} <= set(agentrl.list_environments())
    assert {"boxed", "exact", "format", "length", "numeric"} <= set(agentrl.list_rewards())


@pytest.mark.parametrize("name", ["calculator", "mine"])
def test_a_taken_name_is_refused(name: str) -> None:
    agentrl.register("mine", Mine)
    with pytest.raises(UserError, match="is taken by"):
        agentrl.register(name, ToolEnv)


@pytest.mark.parametrize("name", ["", "a:b", "a/b"])
def test_a_name_that_reads_like_a_path_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="a name is not empty"):
        agentrl.register(name, Mine)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(UserError, match="a kind is one of environment, reward, sandbox"):
        agentrl.register("x", Mine, kind="engine")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("group", "listed"),
    [
        ("agentrl.environments", agentrl.list_environments),
        ("agentrl.rewards", agentrl.list_rewards),
        ("agentrl.sandboxes", registry.list_sandboxes),
    ],
)
def test_an_installed_package_declares_names(
    monkeypatch: pytest.MonkeyPatch, module: Path, group: str, listed: Callable[[], Sequence[str]]
) -> None:
    point = importlib.metadata.EntryPoint("declared", "registry_probe:Inner.Deep", group)

    def entry_points(*, group: str, name: str = "declared") -> list[importlib.metadata.EntryPoint]:
        return [point] if (group, name) == (point.group, point.name) else []

    monkeypatch.setattr(registry, "entry_points", entry_points)
    assert "declared" in listed()
    others = {agentrl.list_environments, agentrl.list_rewards, registry.list_sandboxes} - {listed}
    assert not any("declared" in other() for other in others)
    if group == "agentrl.environments":
        assert type(agentrl.make("declared")).__name__ == "Deep"
    if group == "agentrl.sandboxes":
        registry.check_sandbox("declared")


def test_module_and_file_names_reach_into_them(module: Path) -> None:
    assert type(agentrl.make("registry_probe:Inner.Deep")).__qualname__ == "Inner.Deep"
    for place in (str(module), module.name, f"./{module.name}"):
        assert type(agentrl.make(f"{place}:Inner.Deep")).__qualname__ == "Inner.Deep"
    first, second = (type(agentrl.make(f"{place}:Inner.Deep")) for place in (module, module.name))
    assert first is second


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "calculater",
            "no environment named 'calculater'; did you mean 'calculator'.*Your own: 'package.module:Name'",
        ),
        ("zzz", "no environment named 'zzz'; there are .*calculator.*math"),
        (
            "no_such_module:Env",
            "can't import the environment's module 'no_such_module'.*No module named 'no_such_module'",
        ),
        ("nowhere/env.py:Env", "no file .*nowhere/env.py"),
        ("registry_probe:alwys", "no environment 'alwys' in registry_probe; did you mean 'always'"),
        ("registry_probe.py:Inner.Dep", "no environment 'Inner.Dep' in registry_probe.py"),
    ],
)
def test_a_name_that_leads_nowhere_says_where_it_ended(name: str, text: str, module: Path) -> None:
    with pytest.raises(UnknownName, match=text):
        agentrl.make(name)


@pytest.mark.parametrize("as_file", [True, False])
def test_a_module_that_fails_to_import_shows_its_own_error(as_file: bool, module: Path) -> None:
    module.write_text("import no_such_dependency\n")
    with pytest.raises(UnknownName, match="No module named 'no_such_dependency'"):
        agentrl.make("registry_probe.py:Env" if as_file else "registry_probe:Env")


@pytest.mark.parametrize("as_file", [True, False])
def test_a_bug_in_a_module_is_a_bug(as_file: bool, module: Path) -> None:
    module.write_text("1 // 0\n")
    for _ in range(2):  # the second time, too: no half-made module stays behind
        with pytest.raises(ZeroDivisionError):
            agentrl.make("registry_probe.py:Env" if as_file else "registry_probe:Env")


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        (
            {"size": 1, "color": 2},
            "takes no 'color'; did you mean 'colour'.; it takes size, colour, max_turns",
        ),
        ({"size": 1, "max_turn": 2}, "takes no 'max_turn'; did you mean 'max_turns'"),
        ({"colour": "blue"}, "needs size"),
    ],
)
def test_wrong_settings_name_the_right_ones(kwargs: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=text):
        agentrl.make(Mine, **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"size": "many"}, r"Mine has size='many'; it must be of type int$"),
        ({"size": 1.5}, r"size=1.5; it must be of type int$"),
        ({"size": True}, "size=True"),
        ({"size": 1, "colour": ["red"]}, r"colour=\['red'\]; it must be of type str$"),
        ({"size": 1, "max_turns": "x"}, r"max_turns='x'; it must be of type (Optional\[int\]|int \| None)$"),
        ({"size": 1, "bad_calls": "stop"}, r"bad_calls='stop'; it must be of type .*'explain', 'end'"),
        ({"size": 1, "reward": 5}, r"reward=5.*callable that takes an Evidence"),
    ],
)
def test_a_setting_of_a_wrong_type_says_which_it_must_be(kwargs: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=text):
        agentrl.make(Mine, **kwargs)


def test_a_list_is_a_tuple_an_integer_a_float_and_an_object_anything() -> None:
    class Loose(Mine):
        def __init__(self, *, places: tuple[int, ...], wait_s: float, clock: Any = None, **settings: Any):
            super().__init__(size=1, **settings)
            self.places = places

    env = agentrl.make(Loose, places=[1, 2], wait_s=3, clock=object(), reward=lambda evidence: 1.0)
    assert env.places == [1, 2]  # type: ignore[attr-defined]  # as it was given
    assert agentrl.make(Loose, places=range(3), wait_s=3).places == range(3)  # type: ignore[attr-defined]


def test_a_class_may_give_what_its_base_requires() -> None:
    class Small(Mine):
        def __init__(self, **settings: Any) -> None:
            super().__init__(size=1, **settings)

    assert agentrl.make(Small, colour="blue").size == 1  # type: ignore[attr-defined]


def test_a_type_error_inside_a_constructor_stays_a_bug() -> None:
    class Broken(Mine):
        def __init__(self) -> None:
            super().__init__(size=len(3))  # type: ignore[arg-type]

    with pytest.raises(TypeError, match="has no len"):
        agentrl.make(Broken)


def test_classes_factories_and_instances_are_environments_too() -> None:
    env = Mine(size=2)
    assert agentrl.make(env) is env
    assert agentrl.make(Mine, size=4).size == 4  # type: ignore[attr-defined]
    assert agentrl.make(lambda: env) is env
    with pytest.raises(UserError, match="made already, so size would have no effect"):
        agentrl.make(env, size=3)


@pytest.mark.parametrize("stranger", [dict, lambda: gymnasium.make("CartPole-v1")], ids=["dict", "cart pole"])
def test_what_is_no_environment_of_ours_is_refused(stranger: Any) -> None:
    with pytest.raises(UserError, match=r"derive from agentrl\.ToolEnv"):
        agentrl.make(stranger)


def test_a_reward_is_a_name_a_class_or_a_function(module: Path) -> None:
    def half(evidence: Evidence) -> float:
        return 0.5

    assert agentrl.make_reward(half) is half
    assert type(agentrl.make_reward("exact")).__name__ == "Exact"
    evidence = Evidence(Task(id="1", prompt=()), ())
    assert agentrl.make_reward("registry_probe:always")(evidence) == 1.0
    agentrl.register("half", half, kind="reward")
    assert agentrl.make_reward("half") is half
    with pytest.raises(UserError, match="plain callable, so scale would have no effect"):
        agentrl.make_reward("half", scale=2)
    with pytest.raises(UnknownName, match="no reward named 'exacct'; did you mean 'exact'"):
        agentrl.make_reward("exacct")
    with pytest.raises(UserError, match="takes no 'tolerence'"):
        agentrl.make_reward("numeric", tolerence=1)


def test_gymnasium_knows_the_catalogue() -> None:
    assert {"agentrl/Calculator-v0", "agentrl/Math-v0"} <= set(gymnasium.registry)


@pytest.mark.parametrize("target", [None, "calculator", 3])
def test_what_can_not_be_made_is_not_registered(target: Any) -> None:
    with pytest.raises(UserError, match="give a class, a factory or 'module:Name'"):
        registry.register("s", target)
    assert "s" not in registry.list_environments()


def test_a_hint_ends_its_sentence() -> None:
    with pytest.raises(UnknownName, match=r"did you mean 'calculator'\? Your own: 'package"):
        registry.make("calculater")
    with pytest.raises(UnknownName, match=r"workspace\. Your own: 'package"):
        registry.make("zzz")
