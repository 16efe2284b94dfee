"""The house rules that a reader relies on: floors, heavy imports, sizes, contracts; read from the source."""

from __future__ import annotations

import ast
import importlib
import io
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import agentrl

_ROOT = Path(__file__).parent.parent
_CATALOGUES = ("environments", "rewards", "sandboxes")
# Imports go down, or stay on their floor without a circle. A new module is entered here.
_FLOORS: tuple[frozenset[str], ...] = tuple(
    frozenset(names.split())
    for names in (
        "types errors seeds files stop_signal allocator stopwatch",
        "env tool_env faults watchdog tools schemas dispatch tasks wrappers spaces transcript answers reward "
        "engine registry checks probes contract isolation scoring robustness resources sandbox sandboxing "
        "sandbox_cli judge judging attacks interpreter interpreter_process session_env codedata evalplus "
        "codetests questions rows workspaces config configfile modelfiles workers worker_handle "
        "worker_process threads",
        "environments rewards sandboxes",
        "rollout ahead attempts samples schedule chat chats certificate parsers advantages statistics "
        "metrics alarms batches losses attention models softmax memory merging",
        "engines learner checkpoint resume warm_start log tiny show export",
        "training trainer canary bench evaluation heldout prepare preflight serving",
        "cli __main__",
    )
)
_LIGHT = 2  # the highest floor that must load neither torch nor transformers
_HEAVY = frozenset({"torch", "transformers", "tokenizers", "peft", "accelerate", "vllm", "safetensors"})
_ONLY_IN = {
    "accelerate": {"agentrl/learner.py", "agentrl/log.py"},
    "vllm": {
        "agentrl/engines/vllm_core.py",
        "agentrl/engines/vllm_lora.py",
        "agentrl/engines/vllm_transfer.py",
        "agentrl/engines/vllm_worker.py",
        "agentrl/parsers/vllm.py",
    },
}
_MOST_LINES = 450  # of a file
_MOST_FUNCTION_LINES = 60  # of code: without docstring, comments and blank lines


def _shipped() -> list[Path]:
    folders = ("agentrl", *_CATALOGUES)
    return sorted(path for folder in folders for path in (_ROOT / folder).rglob("*.py"))


_MODULES = _shipped()
_modules = pytest.mark.parametrize("path", _MODULES, ids=lambda path: str(path.relative_to(_ROOT)))


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _name(path: Path) -> str:
    """``agentrl/engines/embedded.py`` as "agentrl.engines.embedded", a catalogue's file as agentrl's."""
    parts = path.relative_to(_ROOT).with_suffix("").parts
    parts = parts if parts[0] == "agentrl" else ("agentrl", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(path: Path, *, loading: bool = False) -> Iterator[str]:
    """Every module that is imported at run time; only while the module itself loads if ``loading``."""
    for node in _run_time_nodes(_tree(path), loading=loading):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}, line {node.lineno}: write the import absolutely"
            assert node.module is not None
            submodules = (f"{node.module}.{alias.name}" for alias in node.names)
            known = {_name(module) for module in _MODULES}
            inner = [name for name in submodules if name in known]
            yield from inner or [node.module]


def _run_time_nodes(node: ast.AST, *, loading: bool) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if (
            isinstance(child, ast.If)
            and isinstance(child.test, ast.Name)
            and child.test.id == "TYPE_CHECKING"
        ):
            continue
        if loading and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        yield child
        yield from _run_time_nodes(child, loading=loading)


def _floor(module: str) -> int:
    """The floor of ``agentrl.<part>...``."""
    part = module.split(".")[1]
    found = [floor for floor, names in enumerate(_FLOORS) if part in names]
    assert found, f"agentrl.{part} is on no floor: enter it in _FLOORS of {Path(__file__).name}"
    return found[0]


def _our_imports(path: Path, *, loading: bool = False) -> set[str]:
    return {name for name in _imports(path, loading=loading) if name.partition(".")[0] == "agentrl"}


def _is_facade(path: Path) -> bool:
    return path == _ROOT / "agentrl" / "__init__.py"


@_modules
def test_imports_go_down_the_floors(path: Path) -> None:
    if _is_facade(path):
        return
    module = _name(path)
    assert "agentrl" not in _our_imports(path), (
        f"{module} imports the facade: import the module that has the name"
    )
    upward = {name for name in _our_imports(path) if _floor(name) > _floor(module)}
    assert not upward, f"{module} is on floor {_floor(module)} and imports {upward} above it"


def test_loading_has_no_circle() -> None:
    graph = {_name(path): _our_imports(path, loading=True) - {_name(path)} for path in _MODULES}
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


@_modules
def test_heavy_libraries_stay_on_their_floors(path: Path) -> None:
    heavy = {name.partition(".")[0] for name in _imports(path)} & _HEAVY
    if _is_facade(path) or _floor(_name(path)) <= _LIGHT:
        assert not heavy, f"{_name(path)} must not load {heavy}"
    for library, places in _ONLY_IN.items():
        if library in heavy:
            assert str(path.relative_to(_ROOT)) in places, f"{library} belongs in {places}"


@_modules
def test_the_lowest_floor_needs_nothing_but_numpy(path: Path) -> None:
    if _is_facade(path) or _floor(_name(path)) > 0:
        return
    foreign = {name.partition(".")[0] for name in _imports(path)} - sys.stdlib_module_names
    assert foreign <= {"agentrl", "numpy"}


@_modules
def test_a_catalogue_imports_the_core_and_no_catalogue(path: Path) -> None:
    here = path.relative_to(_ROOT).parts[0]
    assert not {name.partition(".")[0] for name in _imports(path)} & set(_CATALOGUES)
    if here in _CATALOGUES:
        reached = {name.split(".")[1] for name in _our_imports(path)}
        assert not reached & (set(_CATALOGUES) - {here})


@_modules
def test_a_module_states_its_contract_and_its_names(path: Path) -> None:
    tree = _tree(path)
    assert ast.get_docstring(tree), f"{path} has no docstring"
    if path.name == "__main__.py" or len(tree.body) == 1:  # a docstring alone has no names
        return
    assigned = [
        *(target for node in tree.body if isinstance(node, ast.Assign) for target in node.targets),
        *(node.target for node in tree.body if isinstance(node, ast.AnnAssign)),
    ]
    targets = {target.id for target in assigned if isinstance(target, ast.Name)}
    assert "__all__" in targets, f"{path} has no __all__"


@_modules
def test_a_file_is_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= _MOST_LINES


@_modules
def test_a_function_is_short(path: Path) -> None:
    code = _lines_of_code(path)
    long = {}
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            lines = code & set(range(node.lineno, node.end_lineno + 1)) - _docstring_lines(node)
            if len(lines) > _MOST_FUNCTION_LINES:
                long[node.name] = len(lines)
    assert not long, f"{path}: at most {_MOST_FUNCTION_LINES} lines of code, not {long}"


def _lines_of_code(path: Path) -> set[int]:
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline)
    spans = (range(token.start[0], token.end[0] + 1) for token in tokens if token.type not in skipped)
    return {line for span in spans for line in span}


def _docstring_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> set[int]:
    first = function.body[0]
    if ast.get_docstring(function) is None or first.end_lineno is None:
        return set()
    return set(range(first.lineno, first.end_lineno + 1))


def _fresh_python(code: str) -> str:
    """What ``code`` prints in an interpreter of its own, started in the checkout."""
    done = subprocess.run([sys.executable, "-c", code], cwd=_ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("module", ["agentrl", "agentrl.cli", "agentrl.configfile"])
def test_importing_is_light(module: str) -> None:
    code = f"import sys, {module}; print(*sorted({set(_HEAVY)!r} & set(sys.modules)))"
    assert _fresh_python(code) == ""


def test_importing_agentrl_leaves_pydantic_to_the_first_tool() -> None:
    lists = "print(*sorted({'pydantic'} & set(sys.modules)))"
    assert _fresh_python(f"import sys, agentrl; {lists}") == ""
    assert _fresh_python(f"import sys, agentrl; agentrl.make('calculator'); {lists}") == "pydantic"


def test_help_is_printed_by_what_was_imported_lightly() -> None:
    code = (
        "import sys; from agentrl.cli import app; app(['--help'], standalone_mode=False); "
        f"print(*sorted({set(_HEAVY)!r} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=_ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "\n")
    assert "train" in done.stdout


def test_the_facades_names_stay_functions_when_their_modules_are_imported() -> None:
    for name, module in (("train", "training"), ("evaluate", "evaluation")):
        importlib.import_module(f"agentrl.{module}")  # sets an attribute of that name on the package
        assert callable(getattr(agentrl, name))
