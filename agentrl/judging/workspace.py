"""The verdict on a workspace: hidden tests run over what an agent left, in fresh sandboxes.

The agent's own sandbox must be dead by then, and only its regular files come here. Each hidden test gets a
fresh session: nothing that a test's process leaves running or writes reaches the next. Files that hook into
Python or pytest, or that would be imported in the place of a hidden one, are left out of the workspace and
flagged, as is what stands in a file that no honest one needs. Test and solution share a process, which the
Judgement says.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import PurePosixPath

from agentrl.errors import BadConfig, BadData
from agentrl.judging.comparing import Garbled
from agentrl.judging.line import Line, python
from agentrl.judging.record import Record, is_over_cpu
from agentrl.judging.verdicts import AssertTest, FileTests, Judgement, Problem
from agentrl.sandbox import Channel, Limits, Sandbox, check_path

__all__ = ["judge_workspace_once"]

# By name: what Python or pytest would load by itself; the compiled, which need not be what its source says.
_HOOKS = frozenset({"conftest.py", "sitecustomize.py", "usercustomize.py"})
_COMPILED = (".pyc", ".pyo", ".pth")
_MODULES = (".py", ".so", ".pyd")


def judge_workspace_once(
    files: Mapping[str, bytes],
    tests: FileTests,
    *,
    open_sandbox: Callable[[Limits], Sandbox],
    limits: Limits,
) -> Judgement:
    """Judge in fresh sandboxes. Raises SandboxLost, BadConfig for bad names, BadData for odd tests."""
    placed, flags = _placed(files, tests)
    expected = tuple(AssertTest(id=node, code="", trust="shared") for node in tests.expected)
    problem = Problem(tests=expected, entry_point="workspace")
    texts = [data.decode(errors="replace") for data in files.values()]
    record = Record("\n".join(texts), problem, open_sandbox, limits, stop_early=False)
    record.flags |= flags
    for test in expected:
        if record.is_late:
            record.enter(test, "TLE", ran=False)
            continue
        with closing(open_sandbox(limits)) as sandbox:
            if note := _place(sandbox, placed):
                record.enter(test, "RE", note, ran=False)
            else:
                _grade(record, sandbox, test, tests.files)
    return record.judgement()


def _place(sandbox: Sandbox, files: Mapping[str, bytes]) -> str:
    """Write the agent's files; what is wrong with them where they don't fit, or into each other's folders."""
    try:
        for path, data in files.items():
            sandbox.write(path, data)
    except OSError as error:
        return f"the files that were left can't be placed: {error}"
    return ""


def _placed(files: Mapping[str, bytes], tests: FileTests) -> tuple[dict[str, bytes], set[str]]:
    """The agent's files that are taken along, and flags for those that are not."""
    hidden = {check_path(path) for path in tests.files}
    folders = {folder for path in hidden for folder in path.parents}
    placed: dict[str, bytes] = {}
    flags = set()
    for name, data in files.items():
        if _is_odd(name):
            flags.add("odd_names")
            continue
        path = check_path(name)
        if path.name in _HOOKS:
            flags.add("hooks")
        elif _shadows(path, hidden, folders):
            flags.add("shadows")
        elif not (path in hidden or path in folders or _lies_under(path, hidden) or path.suffix in _COMPILED):
            placed[name] = data
    return placed, flags


def _is_odd(name: str) -> bool:
    """Whether an agent gave a file a name that none is written under; raises BadConfig for no such thing: one
    that leads out of the workspace."""
    try:
        check_path(name)
    except BadConfig:
        if any(part in ("", ".", "..") for part in name.split("/")):
            raise
        return True
    return False


def _shadows(path: PurePosixPath, hidden: set[PurePosixPath], folders: set[PurePosixPath]) -> bool:
    """Whether an import of what is hidden would find an agent's file: a package before a module, a compiled
    module before a source, a module before a folder without __init__.py."""
    modules = {one.with_suffix("") for one in hidden if one.suffix == ".py"}
    if any(parent in modules for parent in path.parents):
        return True
    if path in hidden or path.suffix not in _MODULES:
        return False
    stem = path.with_name(path.name.partition(".")[0])
    return stem in modules or stem in folders


def _lies_under(path: PurePosixPath, hidden: set[PurePosixPath]) -> bool:
    return any(parent in hidden for parent in path.parents)


def _grade(record: Record, sandbox: Sandbox, test: AssertTest, hidden: Mapping[str, bytes]) -> None:
    outcome, garbled = "", False
    is_hooked = any(PurePosixPath(path).name == "conftest.py" for path in hidden)

    def talk(channel: Channel) -> None:
        nonlocal outcome, garbled
        try:
            outcome = _outcome(Line(channel), test.id, is_hooked=is_hooked)
        except Garbled:
            garbled = True

    result = record.add(
        sandbox.run(python("grading_process"), stdin=talk, files=dict(hidden), limits=record.left())
    )
    if outcome and not is_over_cpu(result, record.limits):
        record.flags |= {"exit_early"} if outcome == "silent" else set()
        record.enter(test, "AC" if outcome == "passed" else "RE" if outcome == "silent" else "WA")
    record.settle([test], result, garbled=garbled)


def _outcome(line: Line, node: str, *, is_hooked: bool) -> str:
    """Raises BadData for a test that can't be run here, Garbled, Gone."""
    line.send(["grade", node, is_hooked])
    said = line.receive()
    if said[0] == "unsupported":  # said before any of the agent's code is loaded
        raise BadData(
            f"the test {node!r} can't be run here: {said[1:]}; install pytest in the sandbox's Python"
        )
    nonce = secrets.token_hex(16)
    line.send(["nonce", nonce])
    told = line.receive()
    if said != ["forked"] or len(told) != 4 or told[0] != "done" or told[3] != nonce:
        raise Garbled("no outcome of a test")
    return str(told[1])
