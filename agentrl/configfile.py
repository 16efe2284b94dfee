"""From a file, a mapping or an environment's name, and ``key=value`` overrides, to a checked RunConfig.

Every fault is a BadConfig, a line each: the source, the dotted key, the value, what is allowed.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ValidationError

from agentrl.config import EngineConfig, RunConfig
from agentrl.errors import BadConfig, UnknownName, did_you_mean
from agentrl.registry import list_environments

__all__ = ["load_config", "load_engine", "packaged_configs", "parse_assignments", "resolve_target"]

Target = tuple[Literal["config"], Path] | tuple[Literal["environment"], str]


class _Loader(yaml.SafeLoader):
    """YAML without its two traps: ``1e-5`` is a number, and a key that stands twice is refused."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key must be a plain text", problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value!r} stands twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


# YAML 1.1 wants a dot and a signed exponent in a float, so PyYAML reads 1e-5 as a text.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def load_config(
    source: str | Path | Mapping[str, Any], overrides: Sequence[str] = (), *, model: str | None = None
) -> RunConfig:
    """The configuration of a file, a packaged name, an environment or a mapping, after ``overrides``.

    An override is ``a.b.c=value`` with a YAML value; ``null`` takes the default. ``model`` (a folder or a hub
    id) replaces the model that the source names. A run without a name is called like its file or environment.
    Raises BadConfig, and UnknownName where ``source`` names nothing.
    """
    where, values = _read(source)
    for key, value in parse_assignments(overrides).items():
        _assign(values, key, value)
    if model is not None:
        _assign(values, "model.tiny", None)
        _assign(values, "model.path", model)
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        faults = dict.fromkeys(_faults(error))
        raise BadConfig("\n".join(f"{where}: {fault}" for fault in faults)) from None


def load_engine(assignments: Sequence[str]) -> EngineConfig:
    """The ``engine`` section that ``key=value`` assignments make, each without the section's name; a word
    without a ``=`` is the kind.

    Raises BadConfig.
    """
    values: dict[str, Any] = {"engine": {}}
    for key, value in parse_assignments(a if "=" in a else f"kind={a}" for a in assignments).items():
        _assign(values, f"engine.{key}", value)
    try:
        return EngineConfig.model_validate(values["engine"])
    except ValidationError as error:
        faults = dict.fromkeys(_faults(error, ("engine",)))
        raise BadConfig("\n".join(f"--engine: {fault}" for fault in faults)) from None


def resolve_target(text: str) -> Target:
    """What ``text`` names: an existing file, else a packaged configuration, else an environment.

    Raises BadConfig where it could be several of them, and UnknownName where it is none.
    """
    _check_file_name(text)
    found: list[Target] = []
    packaged, environments = packaged_configs(), list_environments()
    if Path(text).is_file():
        found.append(("config", Path(text)))
    if text in packaged:
        found.append(("config", packaged[text]))
    if text in environments or ":" in text:
        found.append(("environment", text))
    if len(found) > 1:
        listing = ", ".join(f"the {kind} {name}" for kind, name in found)
        raise BadConfig(f"{text!r} is ambiguous: {listing}; write ./{text} for the file, or rename it")
    if not found:
        raise UnknownName(_unknown_target(text, [*packaged, *environments]))
    return found[0]


def _check_file_name(text: str) -> None:
    """Raises BadConfig for what stands there and is no configuration."""
    path = Path(text)
    if path.is_dir() and "/" in text:
        inside = ", ".join(sorted(str(entry) for entry in path.glob("*.yaml"))) or "none"
        raise BadConfig(f"{text!r} is a folder: name a YAML file; in it there is {inside}")
    if path.suffix == ".py" and path.is_file():
        raise BadConfig(f"{text!r} is Python, no YAML: name the environment that it defines, as {text}:Name")


def _unknown_target(text: str, names: Sequence[str]) -> str:
    """What to say of a target that is nothing: a file may be meant to be one beside it."""
    path = Path(text)
    if path.suffix not in (".yaml", ".yml") and "/" not in text:
        hint = did_you_mean(text, names)
        known = "a file, a packaged configuration, an environment's name or 'package.module:Name'"
        return f"nothing called {text!r}{hint or f'; it must be {known}.'} See 'agentrl list'."
    beside = {entry.name: str(path.with_name(entry.name)) for entry in sorted(path.parent.glob("*.y*ml"))}
    close = difflib.get_close_matches(path.name, beside, n=1)
    meant = f"; did you mean {beside[close[0]]!r}?" if close else did_you_mean(path.stem, names)
    hint = meant or f"; packaged are {', '.join(packaged_configs())}."
    return f"no file {text!r} (seen from {Path.cwd()}){hint} See 'agentrl list'."


def packaged_configs() -> dict[str, Path]:
    """The configurations that come with the package, by name."""
    found = (Path(str(entry)) for entry in files("agentrl.configs").iterdir())
    return {path.stem: path for path in sorted(found) if path.suffix == ".yaml"}


def parse_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """``["a.b=1", "c=x"]`` as ``{"a.b": 1, "c": "x"}``: values are YAML, nothing after the ``=`` is None."""
    values: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise BadConfig(
                f"{assignment!r} is no setting; it must be key=value, without spaces around the ="
            )
        if key in values:
            raise BadConfig(f"{key} is set twice: remove one")
        values[key] = _parse(text, where=repr(assignment))
    return values


def _read(source: str | Path | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """What to call the source in messages, and its values."""
    if isinstance(source, Mapping):
        return "the configuration", deepcopy(dict(source))
    kind, target = ("config", source) if isinstance(source, Path) else resolve_target(source)
    if kind == "environment":
        return str(target), {"name": str(target).rpartition(":")[2], "environment": {"id": str(target)}}
    return str(target), _read_file(Path(target))


def _read_file(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadConfig(f"{path} can't be read: {error}; it must be a YAML file in UTF-8") from None
    values = _parse(text, where=str(path))
    if not isinstance(values, dict):
        raise BadConfig(
            f"{path} holds {type(values).__name__}; it must be a mapping of keys like 'environment'"
        )
    return {"name": path.stem, **values}


def _parse(text: str, *, where: str) -> Any:
    """The YAML value of ``text``."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise BadConfig(f"{where}, line {line}: not YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise BadConfig(f"{where}: not YAML: {' '.join(str(error).split())}") from None
    except ValueError as error:  # what looks like a date or a number, and is none
        raise BadConfig(f"{where}: {error}; put it in quotes where a text is meant") from None


def _assign(values: dict[str, Any], key: str, value: Any) -> None:
    """Set the dotted ``key``; None takes the default, but stands for itself among the args of a section."""
    *parents, last = key.split(".")
    takes_default = value is None and parents[:2] not in (["environment", "args"], ["engine", "args"])
    section = values
    for depth, name in enumerate(parents):
        child = section.get(name)
        if depth == 0 and name == "engine" and isinstance(child, str):
            child = section[name] = {"kind": child}  # as EngineConfig reads it
        if child is not None and not isinstance(child, dict):
            above = ".".join(parents[: depth + 1])
            raise BadConfig(f"{key} can't be set: {above} is {child!r}, which has no keys of its own")
        if child is None and takes_default:
            return
        if child is None:
            section[name] = {}
        section = section[name]
    if takes_default:
        section.pop(last, None)
    else:
        section[last] = value


def _faults(error: ValidationError, section: tuple[str, ...] = ()) -> Iterator[str]:
    """One line a fault: the dotted key, the value, what is allowed; of ``section`` where it stands alone."""
    allowed: dict[str, list[str]] = {}  # by key and value: a union reports each of its members
    faults = error.errors(include_url=False)
    inside = {fault["loc"][:depth] for fault in faults for depth in range(len(fault["loc"]))}
    for fault in faults:
        if fault["type"] == "too_short" and fault["loc"] in inside:
            continue  # it counts the good ones among what has been said to be bad
        place = _place((*section, *fault["loc"]))
        key = ".".join(place)
        if fault["type"] == "extra_forbidden":
            yield f"unknown key {key}{_meant(place)}"
        elif fault["type"] == "value_error":
            yield f"{key}{'.' if key else ''}{fault['ctx']['error']}"
        elif fault["type"] == "missing" and len(place) == len(section) + len(fault["loc"]):
            yield f"{key} is missing: {_missing_hint(key)}"
        else:
            allowed.setdefault(f"{key} is {fault['input']!r}", []).append(_allowed(place, fault["msg"]))
    for wrong, kinds in allowed.items():
        yield f"{wrong}; it must {' or '.join(kinds)}"


def _place(location: Sequence[str | int]) -> tuple[str, ...]:
    """The dotted key of a fault, without the places inside a field's value."""
    place: list[str] = []
    section: type[BaseModel] | None = RunConfig
    for part in location:
        if section is None:
            break
        place.append(str(part))
        section = _child(section, str(part))
    return tuple(place)


def _child(section: type[BaseModel], name: str) -> type[BaseModel] | None:
    """The section that the field ``name`` holds; None for a plain value or an unknown name."""
    field = section.model_fields.get(name)
    if field is None:
        return None
    kinds = (field.annotation, *get_args(field.annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _keys(section: type[BaseModel], prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every key below ``section``."""
    for name in section.model_fields:
        yield (*prefix, name)
        child = _child(section, name)
        if child is not None:
            yield from _keys(child, (*prefix, name))


def _meant(place: tuple[str, ...]) -> str:
    """What an unknown key perhaps means: a sibling, else the same name elsewhere, else all siblings."""
    *parents, name = place
    every = list(_keys(RunConfig))
    siblings = {key[-1]: ".".join(key) for key in every if list(key[:-1]) == parents}
    elsewhere = [".".join(key) for key in every if key[-1] == name]
    close = difflib.get_close_matches(name, siblings, n=1)
    if close or elsewhere:
        meant = [siblings[close[0]]] if close else elsewhere
        return f"; did you mean {' or '.join(map(repr, meant))}?"
    return f"; known are {', '.join(siblings.values())}"


def _missing_hint(key: str) -> str:
    other = ", or pass --model M" if key == "model" else ""
    return f"it has no default; set it in the file or as {key}=...{other}"


def _allowed(place: tuple[str, ...], message: str) -> str:
    """What may stand at ``place``, to follow "it must": from pydantic's message, in the words of YAML."""
    section: type[BaseModel] | None = RunConfig
    for name in place:
        section = section and _child(section, name)
    if section is not None:
        return f"be a mapping with keys of {', '.join(section.model_fields)}"
    if place == ("name",):
        return (
            f"{message[message.find('match') :]}: set name=..., which is the file's stem where it is not set"
        )
    words = {"Field required": "have more items", "valid tuple": "list", " after validation": ""}
    for pydantic, ours in words.items():
        message = message.replace(pydantic, ours)
    return re.sub(r"^\w+ should ", "", message)
