"""Names for environments, rewards and sandboxes: what a name may be, and how it becomes an object.

A name is, in this order: one registered in this process, one of the catalogue, one that an installed package
declares (entry-point groups ``agentrl.environments``, ``agentrl.rewards`` and ``agentrl.sandboxes``),
``package.module:Attr`` (the working directory is importable) or ``path/to/file.py:Attr``. Targets are
imported when first used.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import gymnasium

from agentrl.errors import UnknownName, UserError, did_you_mean
from agentrl.sandboxing.private import keep_private

if TYPE_CHECKING:
    from agentrl.env import Env
    from agentrl.reward import Reward
    from agentrl.sandbox import Backend

__all__ = [
    "Kind",
    "check_sandbox",
    "list_environments",
    "list_rewards",
    "list_sandboxes",
    "make",
    "make_reward",
    "make_sandbox",
    "register",
]

Kind = Literal["environment", "reward", "sandbox"]

_GROUPS: Mapping[Kind, str] = {
    "environment": "agentrl.environments",
    "reward": "agentrl.rewards",
    "sandbox": "agentrl.sandboxes",
}

_CATALOGUE: Mapping[Kind, Mapping[str, str]] = {
    "environment": {
        "calculator": "agentrl.environments.calculator:Calculator",
        "code": "agentrl.environments.code:Code",
        "math": "agentrl.environments.math:Math",
        "python_tool": "agentrl.environments.python_tool:PythonTool",
        "workspace": "agentrl.environments.workspace:Workspace",
    },
    "reward": {
        "boxed": "agentrl.rewards.boxed:Boxed",
        "exact": "agentrl.rewards.exact:Exact",
        "format": "agentrl.rewards.format:Format",
        "length": "agentrl.rewards.length:Length",
        "numeric": "agentrl.rewards.numeric:Numeric",
        "unit_tests": "agentrl.rewards.unit_tests:UnitTests",
    },
    "sandbox": {
        "bubblewrap": "agentrl.sandboxes.bubblewrap:Bubblewrap",
        "docker": "agentrl.sandboxes.docker:Docker",
        "process": "agentrl.sandboxes.process:Process",
        "zygote": "agentrl.sandboxes.zygote:Zygote",
    },
}
_GYMNASIUM_IDS = {
    "agentrl/Calculator-v0": "calculator",
    "agentrl/Code-v0": "code",
    "agentrl/Math-v0": "math",
    "agentrl/PythonTool-v0": "python_tool",
    "agentrl/Workspace-v0": "workspace",
}
_registered: dict[Kind, dict[str, Any]] = {"environment": {}, "reward": {}, "sandbox": {}}


def register(name: str, target: str | Callable[..., Any], kind: Kind = "environment") -> None:
    """Give ``target`` (a class, a factory or ``"module:Attr"``) a name in this process.

    Raises UserError for a name that means something else already, or that reads like a path.
    """
    if kind not in _CATALOGUE:
        raise UserError(f"can't register {name!r} as {kind!r}: a kind is one of {', '.join(_CATALOGUE)}")
    if not name or set(name) & set(":/\\"):
        raise UserError(f"can't register the name {name!r}: a name is not empty and has no ':' or '/'")
    if not callable(target) and not (isinstance(target, str) and ":" in target):
        raise UserError(
            f"can't register {target!r} as the {kind} {name!r}: give a class, a factory or 'module:Name'"
        )
    taken = _registered[kind].get(name, _CATALOGUE[kind].get(name, target))
    if taken != target:
        raise UserError(f"the {kind} name {name!r} is taken by {taken!r}: choose another name")
    _registered[kind][name] = target


def list_environments() -> tuple[str, ...]:
    """Every environment name, sorted."""
    return _names("environment")


def list_rewards() -> tuple[str, ...]:
    """Every reward name, sorted."""
    return _names("reward")


def list_sandboxes() -> tuple[str, ...]:
    """Every sandbox backend's name, sorted."""
    return _names("sandbox")


def make(name: str | type[Env] | Env | Callable[..., Env], **kwargs: Any) -> Env:
    """An environment: of a name, a class or a factory with ``kwargs``; an instance is handed back as it is.

    Raises UnknownName for a name that leads nowhere, UserError for kwargs that do not fit.
    """
    if isinstance(name, gymnasium.Env):
        made: Any = name
        if kwargs:
            raise UserError(
                f"{name!r} is made already, so {', '.join(kwargs)} would have no effect: pass the class"
            )
    else:
        made = _call(_resolve(name, "environment"), kwargs, what=f"environment {_label(name)}")
    if not isinstance(made, gymnasium.Env) or not hasattr(made.unwrapped, "tasks"):
        raise UserError(
            f"{_label(name)} gives a {type(made).__name__}, no environment of ours: "
            "derive from agentrl.ToolEnv or agentrl.Env"
        )
    return cast("Env", made)


def make_reward(name: str | Reward | Callable[..., Any], **kwargs: Any) -> Reward:
    """A reward: a name or a class is called with ``kwargs``; a function of one Evidence is a reward already.

    A name may lead to a class or to such a function. Raises UnknownName and UserError like :func:`make`.
    """
    target = _resolve(name, "reward")
    if inspect.isclass(target):
        target = _call(target, kwargs, what=f"reward {_label(name)}")
    elif kwargs:
        raise UserError(
            f"reward {_label(name)} is a plain callable, so {', '.join(kwargs)} would have no effect"
        )
    if not callable(target):
        raise UserError(f"reward {_label(name)} is {target!r}, which can't be called with an Evidence")
    return cast("Reward", target)


def make_sandbox(name: str | Backend | Callable[..., Backend], **kwargs: Any) -> Backend:
    """A sandbox backend: of a name, a class or a factory with ``kwargs``; an instance as it is.

    Raises UnknownName and UserError like :func:`make`, MissingExtra where it needs a package.
    """
    if not isinstance(name, str) and hasattr(name, "survey") and not inspect.isclass(name):
        return cast("Backend", name)
    made = _call(_resolve(name, "sandbox"), kwargs, what=f"sandbox {_label(name)}")
    if not all(hasattr(made, method) for method in ("survey", "open", "sweep", "close")):
        raise UserError(
            f"{_label(name)} gives a {type(made).__name__}, no sandbox backend: see agentrl.sandbox"
        )
    return cast("Backend", made)


def check_sandbox(name: str) -> None:
    """Raises UnknownName where ``name`` is not "auto", for the strongest one, and leads to no backend."""
    if name != "auto":
        _resolve(name, "sandbox")


def _register_with_gymnasium() -> None:
    """Make the catalogue known to ``gymnasium.make``, as "agentrl/Calculator-v0" for example; idempotent."""
    for gymnasium_id, name in _GYMNASIUM_IDS.items():
        if gymnasium_id not in gymnasium.registry:
            gymnasium.register(gymnasium_id, entry_point=_CATALOGUE["environment"][name])


def _label(name: Any) -> str:
    return repr(name) if isinstance(name, str) else getattr(name, "__qualname__", repr(name))


def _names(kind: Kind) -> tuple[str, ...]:
    declared = (point.name for point in entry_points(group=_GROUPS[kind]))
    return tuple(sorted({*_registered[kind], *_CATALOGUE[kind], *declared}))


def _resolve(name: Any, kind: Kind) -> Any:
    """What a name stands for; anything but a string stands for itself."""
    if not isinstance(name, str):
        return name
    target = _registered[kind].get(name) or _CATALOGUE[kind].get(name, name)
    if not isinstance(target, str):
        return target
    if ":" in target:
        return _load(target, kind)
    for point in entry_points(group=_GROUPS[kind], name=name):
        return _load(point.value, kind)
    hint = did_you_mean(name, _names(kind)) or f"; there are {', '.join(_names(kind))}."
    raise UnknownName(
        f"no {kind} named {name!r}{hint} Your own: 'package.module:Name' or 'path/to/file.py:Name'."
    )


def _load(target: str, kind: Kind) -> Any:
    """Import ``package.module:Attr`` or ``path/to/file.py:Attr``."""
    place, _, attribute = target.rpartition(":")
    is_file = place.endswith(".py") or "/" in place
    module = _load_file(Path(place), kind) if is_file else _load_module(place, kind)
    try:
        return functools.reduce(getattr, attribute.split("."), module)
    except AttributeError:
        public = [name for name, value in vars(module).items() if _is_defined_in(module, name, value)]
        hint = _found_elsewhere(module, place, attribute) + did_you_mean(attribute, public)
        raise UnknownName(
            f"no {kind} {attribute!r} in {place}{hint}; "
            f"it defines {', '.join(public) or 'nothing that can be named'}"
        ) from None


def _found_elsewhere(module: Any, place: str, attribute: str) -> str:
    """Where a module lies that was named and is not the file of its name here, which is meant perhaps."""
    file, here = getattr(module, "__file__", None), Path(f"{place}.py")
    if place.endswith(".py") or (file is not None and Path(file).resolve() == here.resolve()):
        return ""
    meant = f", so for the file here write './{here}:{attribute}'" if here.is_file() else ""
    return f" ({file or 'built into Python'}{meant})"


def _is_defined_in(module: Any, name: str, value: Any) -> bool:
    """Whether ``value`` is a public class or function of the module's own."""
    return not name.startswith("_") and getattr(value, "__module__", None) == module.__name__


def _load_module(place: str, kind: Kind) -> Any:
    if not all(part.isidentifier() for part in place.split(".")):
        raise UnknownName(f"{place!r} is no module to take the {kind} from: write 'package.module:Name'")
    _make_importable(Path.cwd())
    with _telling_why(place, kind):
        module = importlib.import_module(place)
    keep_private(*getattr(sys.modules[place.partition(".")[0]], "__path__", ()))
    return module


@contextmanager
def _telling_why(place: str, kind: Kind) -> Iterator[None]:
    """What a module lacks, however deep inside, becomes one line with its place; a bug in it stays a bug."""
    try:
        yield
    except SystemExit as error:
        raise UnknownName(
            f"can't import the {kind}'s module {place!r}: it exits ({error.code!r}) when imported; put what "
            "it runs under: if __name__ == '__main__'"
        ) from error
    except (ImportError, SyntaxError) as error:
        missing = isinstance(error, ModuleNotFoundError) and place.startswith(error.name or " ")
        where = "" if missing else _origin(error)
        way = "it must be installed or lie in the working directory" if missing else "mend what it names"
        raise UnknownName(
            f"can't import the {kind}'s module {place!r}: {type(error).__name__}: {error}{where}; {way}"
        ) from error


def _origin(error: ImportError | SyntaxError) -> str:
    """The file and line from which an import failed; a SyntaxError says it itself."""
    if isinstance(error, SyntaxError):
        return ""
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if frame.filename != __file__ and "importlib" not in frame.filename]
    return f" ({theirs[-1].filename}, line {theirs[-1].lineno})" if theirs else ""


def _load_file(path: Path, kind: Kind) -> Any:
    path = path.resolve()
    if not path.is_file():
        beside = (entry.name for entry in path.parent.glob("*.py"))
        hint = did_you_mean(path.name, beside)
        raise UnknownName(
            f"no file {path} to take the {kind} from{hint or ': check the path before the colon'}"
        )
    # One module per file, however often it is named, so that its classes are the same classes.
    name = f"agentrl_file_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    _make_importable(path.parent)
    keep_private(path.parent)
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UnknownName(f"{path} can't be imported as Python: a {kind} file ends in .py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        with _telling_why(str(path), kind):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _make_importable(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _call(target: Callable[..., Any], kwargs: Mapping[str, Any], *, what: str) -> Any:
    """Call ``target`` once its keyword arguments are known to fit, so that a TypeError inside stays a bug."""
    if not callable(target):
        raise UserError(f"{what} is {target!r}, which can't be called")
    allowed, required, closed = _parameters(target)
    unknown = [name for name in kwargs if closed and name not in allowed]
    if unknown:
        raise UserError(
            f"{what} takes no {unknown[0]!r}{did_you_mean(unknown[0], allowed)}; "
            f"it takes {', '.join(allowed) or 'nothing'}"
        )
    missing = [name for name in required if name not in kwargs]
    if missing:
        raise UserError(f"{what} needs {', '.join(missing)}; it takes {', '.join(allowed)}")
    if kwargs:
        from agentrl.schemas import check_types  # which loads pydantic

        check_types(_constructors(target), kwargs, what=what)
    return target(**kwargs)


def _constructors(target: Callable[..., Any]) -> tuple[Callable[..., Any], ...]:
    """The functions whose parameters a call of ``target`` may name: of a class its own and its bases'."""
    if not inspect.isclass(target):
        return (target,)
    return tuple(vars(cls)["__init__"] for cls in target.__mro__ if "__init__" in vars(cls))


@functools.lru_cache(maxsize=256)
def _parameters(target: Callable[..., Any]) -> tuple[tuple[str, ...], tuple[str, ...], bool]:
    """Keyword arguments: (allowed, required, whether no other is); ``**rest`` is followed to the bases, whose
    required ones a class may give itself."""
    allowed: dict[str, bool] = {}
    is_class = inspect.isclass(target)
    for depth, function in enumerate(_constructors(target)):
        parameters = list(inspect.signature(function).parameters.values())[is_class:]
        for parameter in parameters:
            if parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD):
                allowed.setdefault(parameter.name, depth == 0 and parameter.default is parameter.empty)
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            return tuple(allowed), tuple(name for name, needed in allowed.items() if needed), True
    return tuple(allowed), tuple(name for name, needed in allowed.items() if needed), False


_register_with_gymnasium()
