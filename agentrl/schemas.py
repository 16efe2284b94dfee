"""What type hints allow: the arguments of tools as a validator and a JSON schema, settings as a check.

pydantic's part of the environments, in a module of its own that is imported when first used: pydantic takes
a tenth of a second.
"""

from __future__ import annotations

import functools
import inspect
import json
import re
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Annotated, Any, NotRequired

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError
from typing_extensions import TypedDict

from agentrl.errors import BadArguments, UserError, did_you_mean

__all__ = ["Arguments", "check_types"]

# Types are made at run time here, which a type checker only knows written out.
_annotated: Any = Annotated
_typed_dict: Any = TypedDict


class Arguments:
    """What the function of a tool takes, by name; parameters with a default may be left out."""

    def __init__(
        self,
        function: Callable[..., Any],
        parameters: Mapping[str, inspect.Parameter],  # those that the model fills in
        documented: Mapping[str, str],  # the texts of those that have one
    ) -> None:
        """Raises UserError for type hints that make no JSON schema."""
        self._name, self._qualname = function.__name__, function.__qualname__
        self._parameters = parameters
        self._adapter = _make_adapter(function, parameters, documented)

    def parse(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments as the function takes them; those left out are absent.

        Raises BadArguments, with a text for the model to read.
        """
        try:
            # Through JSON, where an enum is its value and a tuple a list, but a string still is no integer.
            return self._adapter.validate_json(json.dumps(dict(given)), strict=True)
        except ValidationError as error:
            raise BadArguments(_explain(error, self._name, tuple(self._parameters))) from None
        except (ValueError, RecursionError) as error:
            raise BadArguments(f"the arguments of {self._name} are no usable JSON: {error}") from None

    def schema(self) -> dict[str, Any]:
        """JSON schema of an object, without titles and references."""
        with _refusing(self._qualname):
            schema = self._adapter.json_schema()
        definitions = schema.pop("$defs", {})
        plain: dict[str, Any] = _plain(schema, definitions, opened=())
        plain.setdefault("properties", {})
        for name, parameter in self._parameters.items():
            default = parameter.default
            if default is None or isinstance(default, str | int | float | bool):
                plain["properties"][name].setdefault("default", default)
        return plain


def _make_adapter(
    function: Callable[..., Any],
    parameters: Mapping[str, inspect.Parameter],
    documented: Mapping[str, str],
) -> TypeAdapter[dict[str, Any]]:
    """A validator of the arguments as one typed dictionary."""
    try:
        hints = typing.get_type_hints(function, include_extras=True)
    except NameError as error:
        raise UserError(
            f"tool {function.__qualname__}: {error} in its type hints; import it at the module's top"
        ) from error
    fields: dict[str, Any] = {}
    for name, parameter in parameters.items():
        text = documented.get(name) or _annotated_text(hints[name])
        hint = _annotated[hints[name], Field(description=text)] if text else hints[name]
        fields[name] = hint if parameter.default is parameter.empty else NotRequired[hint]
    arguments = _typed_dict("arguments", fields)
    arguments.__pydantic_config__ = ConfigDict(extra="forbid")
    with _refusing(function.__qualname__):
        return TypeAdapter(arguments)


@contextmanager
def _refusing(qualname: str) -> Iterator[None]:
    """Types that pydantic can't validate, or can but no JSON schema describes, are the author's to change."""
    try:
        yield
    except PydanticUserError as error:
        reason = str(error).splitlines()[0].removesuffix(".")
        raise UserError(f"tool {qualname}: {reason}. Use types that JSON can carry.") from error


def _annotated_text(hint: Any) -> str | None:
    extras = getattr(hint, "__metadata__", ())
    return next((extra for extra in extras if isinstance(extra, str)), None)


def _plain(schema: Any, definitions: Mapping[str, Any], *, opened: tuple[str, ...]) -> Any:
    """``schema`` without titles and with references written out: chat templates read no references."""
    if isinstance(schema, list):
        return [_plain(item, definitions, opened=opened) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        if name in opened:
            raise UserError(
                f"a tool's parameter of type {name} contains itself; a model can't be shown such a schema"
            )
        siblings = {key: value for key, value in schema.items() if key != "$ref"}
        return {**_plain(definitions[name], definitions, opened=(*opened, name)), **siblings}
    plain = {}
    for key, value in schema.items():
        if key == "properties":  # its keys are names of parameters, one of which may well be "title"
            plain[key] = {name: _plain(item, definitions, opened=opened) for name, item in value.items()}
        elif key != "title":
            plain[key] = _plain(value, definitions, opened=opened)
    return plain


def _explain(error: ValidationError, name: str, known: tuple[str, ...]) -> str:
    """Every complaint in one line, for the model to read."""
    complaints = []
    for detail in error.errors(include_url=False, include_context=False, include_input=False):
        place = ".".join(map(str, detail["loc"]))
        if detail["type"] == "extra_forbidden":
            complaints.append(f"there is no argument {place!r}{did_you_mean(place, known)}")
        elif detail["type"] == "missing":
            complaints.append(f"the argument {place!r} is missing")
        else:
            complaints.append(f"{place}: {detail['msg']}" if place else detail["msg"])
    return f"wrong arguments for {name}: " + "; ".join(complaints)


# -- settings --


def check_types(functions: tuple[Callable[..., Any], ...], values: Mapping[str, Any], *, what: str) -> None:
    """Raises UserError for plain data, as YAML gives it, that the type hint of its parameter rules out.

    ``functions``: those whose parameters ``values`` may name; of several, the first that has one counts.
    """
    known = _hints(functions)
    for name in (name for name in values if name in known):
        text, adapter = known[name]
        try:
            # Through JSON, where a list is also a tuple, but a string still is no integer.
            adapter.validate_json(json.dumps(values[name]), strict=True)
        except ValidationError:
            message = f"{what} has {name}={values[name]!r}; it must be of type {text}"
            raise UserError(message) from None
        except (TypeError, ValueError):  # objects, which only Python hands in: its type checkers know more
            continue


@functools.lru_cache(maxsize=256)
def _hints(functions: tuple[Callable[..., Any], ...]) -> Mapping[str, tuple[str, TypeAdapter[Any]]]:
    """Each keyword argument's type hint as text and what checks it, where plain data can fit it."""
    found: dict[str, tuple[str, TypeAdapter[Any]]] = {}
    for function in functions:
        try:
            hints = typing.get_type_hints(function, include_extras=True)
        except NameError:  # imported for type checkers alone
            continue
        for name, hint in hints.items():
            with suppress(PydanticUserError):  # a protocol, say
                # Resolved, so that a literal shows what it allows; without the modules' names.
                text = re.sub(r"\b(?:[a-z_]\w*\.)+", "", inspect.formatannotation(hint))
                found.setdefault(name, (text, TypeAdapter(hint)))
    return found
