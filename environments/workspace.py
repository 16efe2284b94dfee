"""A small repository with a bug: find it, repair it, and hidden tests judge what was left.

Tools list, read and write files and run commands, all in a sandbox of the episode's own. When the episode
ends the files that were there from the start are copied out of it, once nothing runs there any more, and
hidden tests run over them in a fresh one; what else was made (tests, caches, hooks) stays behind. A workspace
that was not changed is worth nothing and is not judged: it does have the bug. Hidden tests that pass on the
files as they were earn nothing where shares are paid.

``path``: a file with repositories of one's own, in the form of ``agentrl.workspaces``; else the bundled ones.
"""

from __future__ import annotations

import ast
import math
import os
import threading
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal

from agentrl.errors import BadConfig, BadData, ToolError
from agentrl.faults import in_line
from agentrl.judge import FileTests, Judgement, shared_judge
from agentrl.reward import Evidence
from agentrl.sandbox import ExecResult, Limits, Sandbox, SandboxLost
from agentrl.sandboxing.private import keep_private
from agentrl.session_env import SessionEnv
from agentrl.tools import tool
from agentrl.types import Message, Score, Task, ToolCall
from agentrl.workspaces import MOST_WRITTEN, WorkspaceTask, parse_workspaces

__all__ = ["Workspace"]

_BUNDLED = Path(__file__).parent / "data" / "workspaces.txt"
_MOST_SHOWN = 4000  # characters of a command's output
_WORK = "/work/"  # where the sandboxes have the repository
_KEPT_FILES = 8  # files of tasks that are kept as read
_LISTING = (
    "import os, sys\nfor folder, folders, files in os.walk('.'):\n"
    "    folders[:] = sorted(f for f in folders if f[:1] != '.' and f != '__pycache__')\n"
    "    for name in sorted(files):\n        path = os.path.join(folder, name)[2:]\n"
    "        shown = ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in path)\n"
    "        sys.stdout.buffer.write(shown.encode() + b'\\n')\n"
)


class Workspace(SessionEnv):
    """Repair a small repository."""

    system = (
        "You work in a small Python repository. Use the tools to find the bug and repair it; files that were "
        "not there are not judged. When it is done, say so in a message without a tool call."
    )
    declared: ClassVar[Mapping[str, str]] = {
        "a copied tool result": "the files that were left are judged, whatever is said last"
    }
    max_turns = 16
    session_limits: ClassVar[Limits] = Limits(cpu_s=10.0, wall_s=40.0, disk_mib=32)
    seconds = 20.0

    def __init__(
        self, *, path: str | None = None, mode: Literal["all", "fraction"] = "all", **settings: Any
    ) -> None:
        """``mode``: "all" pays 1.0 where every hidden test passes. "fraction" pays
        (passed - before) / (all - before), and at least 0.0: ``before`` is how many pass on the files as they
        were, which is judged once a task. A test that is broken takes back what a repaired one earns.
        """
        self._tasks, self._mode = _tasks_in(Path(path).expanduser() if path else _BUNDLED), mode
        present = dict.fromkeys(task.split for task in self._tasks)
        first = {"train": 0, "test": 1}  # what the file has beside them comes last, in its order
        self.splits = tuple(sorted(present, key=lambda split: first.get(split, 2)))  # type: ignore[misc]
        self._left: dict[str, bytes] | None = None
        super().__init__(**settings)

    @tool(remote=True)
    async def list_files(self) -> str:
        """List all files."""
        result = await self.in_turn(self._command, ["python3", "-I", "-c", _LISTING])
        if result.status != "ok":
            raise ToolError(f"not listed: {_end(result)}; run 'ls' with a folder, for fewer files at once")
        cut = f"[cut: {result.truncated} bytes; run 'ls' with a folder]\n" if result.truncated else ""
        return result.stdout.decode(errors="replace") + cut

    @tool(remote=True)
    async def read_file(self, path: str) -> str:
        """Read a file."""
        return await self.in_turn(self._read, path)

    @tool(remote=True)
    async def write_file(self, path: str, content: str) -> str:
        """Write a file anew, its folders made."""
        return await self.in_turn(self._write, path, content)

    @tool(remote=True)
    async def run(self, command: str) -> str:
        """Run a shell command in the repository, such as 'python3 test_it.py'."""
        result = await self.in_turn(self._command, ["sh", "-c", command])
        return _shown(result)

    def tasks(self, split: str) -> Sequence[Task]:
        return [
            Task(
                id=task.name,
                prompt=(Message("user", f"{task.about}\n\nFiles: {', '.join(task.files)}"),),
                truth={
                    "hidden": dict(task.hidden),
                    "names": {path: list(names) for path, names in task.test_names().items()},
                    "gold": dict(task.gold),
                },
                meta={"files": dict(task.files)},
            )
            for task in self._tasks
            if task.split == split
        ]

    def gold(self, task: Task) -> tuple[Message, ...]:
        """Read what is wrong, write it right."""
        turns: list[Message] = []
        for path, text in task.truth["gold"].items():
            for name, arguments in (
                ("read_file", {"path": path}),
                ("write_file", {"path": path, "content": text}),
            ):
                call = ToolCall(id=f"call_{len(turns)}", name=name, arguments=arguments)
                turns.append(Message("assistant", "", (call,)))
        return (*turns, Message("assistant", "The bug is repaired."))

    def as_submission(
        self, task: Task, code: str, files: Mapping[str, str] | None = None
    ) -> tuple[Message, ...]:
        """``code`` in place of each file that the repair changes, and where Python may load it by itself.

        What it calls ``solve`` goes by every name, too, that such a file has to define.
        """
        given = dict.fromkeys(("conftest.py", "sitecustomize.py", "pytest.py"), code)
        for path, text in task.truth["gold"].items():
            given[path] = code + _ALIASES.format(names=_defined(path, text))
        calls = tuple(
            ToolCall(id=f"call_{place}", name="write_file", arguments={"path": path, "content": text})
            for place, (path, text) in enumerate({**given, **(files or {})}.items())
        )
        return (Message("assistant", "", calls), Message("assistant", "The bug is repaired."))

    def setup(self, task: Task) -> None:
        super().setup(task)
        self._left = None

    def open_session(self) -> Sandbox:
        """A sandbox with the task's files in it."""
        session = super().open_session()
        try:
            for path, text in self.task.meta["files"].items():
                session.write(path, text.encode())
        except OSError as error:
            session.close()
            raise SandboxLost(f"a fresh sandbox takes no files: {error}") from error
        return session

    def reward(self, evidence: Evidence) -> Score:
        """What hidden tests say of the files that were left. Raises SandboxLost."""
        files = {path: text.encode() for path, text in self.task.meta["files"].items()}
        left = self._collected(files)
        if left == files:
            return Score(0.0, {"passed": 0.0, "hack_flags": 0.0}, "nothing was changed")
        hidden = {path: text.encode() for path, text in self.task.truth["hidden"].items()}
        names = self.task.truth["names"]
        expected = tuple(f"{path}::{name}" for path in names for name in names[path])
        tests = FileTests(files=hidden, expected=expected)
        judgement = self._judged(left, tests)
        if self._mode == "fraction":
            value = self._repaired(judgement, files, tests)
        else:
            value = float(judgement.verdict == "AC")
        parts = {"passed": judgement.fraction, "hack_flags": float(len(judgement.flags))}
        return Score(
            value, parts, "" if judgement.verdict == "AC" else f"{judgement.verdict}: {judgement.note}"
        )

    def _judged(self, left: Mapping[str, bytes], tests: FileTests) -> Judgement:
        return shared_judge(self.sandbox, limits=self.limits).judge_files(left, tests)

    def _repaired(self, judgement: Judgement, files: Mapping[str, bytes], tests: FileTests) -> float:
        """The share of what fails on ``files``, the task's own, that passes now. Raises BadData for none."""
        passed, total = len(judgement.passed), len(tests.expected)
        if not passed:
            return 0.0
        before = _baselines.setdefault((type(self), self._settings, self.task.id), _Baseline())
        with before.entered():
            if before.passed is None:
                before.passed = len(self._judged(files, tests).passed)
        if before.passed == total:
            raise BadData(
                f"task {self.task.id!r}: all its {total} hidden tests pass on the files as they are, "
                "so that nothing is to be repaired; add a test that fails, or the bug"
            )
        return max(0.0, (passed - before.passed) / (total - before.passed))

    def _collected(self, files: Mapping[str, bytes]) -> dict[str, bytes]:
        """The task's files as they were left, taken once, when no process of the agent's is there."""
        if self._left is None:
            left = dict(files)
            if self._session is not None:
                for path, data in files.items():
                    del left[path]
                    most = MOST_WRITTEN + len(data)
                    with suppress(OSError):  # gone, a link, a pipe, too large: then it is not there
                        left[path] = self._session.read(path, most_bytes=most)
                self.release()
            self._left = left
        return self._left

    def _read(self, path: str) -> str:
        session = self.session()  # outside: a host that opens none is not the model's fault
        with _telling(path):
            return session.read(_inside(path), most_bytes=MOST_WRITTEN).decode(errors="replace")

    def _write(self, path: str, content: str) -> str:
        data = content.encode("utf-8", "replace")
        if len(data) > MOST_WRITTEN:
            raise ToolError(f"not written: more than {MOST_WRITTEN} bytes")
        session = self.session()
        with _telling(path):
            session.write(_inside(path), data)
        return f"wrote {len(data)} bytes"

    def _command(self, argv: Sequence[str]) -> ExecResult:
        wall_s = min(self.left_s, self.limits.wall_s or math.inf)
        result = self.session().run(argv, limits=replace(self.limits, wall_s=wall_s))
        self.spend(result.wall_ms / 1000)
        if result.status == "lost":
            raise SandboxLost("the sandbox of a workspace went away")
        return result


@dataclass(slots=True)
class _Baseline:
    """How many hidden tests pass on a task's files as they are; who holds the lock finds it out."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    passed: int | None = None  # not known yet

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Meanwhile nobody else looks or judges."""
        with in_line():
            self.lock.acquire()
        try:
            yield
        finally:
            self.lock.release()


_baselines: dict[Hashable, _Baseline] = {}  # by class, settings and task: episodes have environments anew
os.register_at_fork(after_in_child=_baselines.clear)  # a thread of the parent's may hold a lock


def _tasks_in(path: Path) -> tuple[WorkspaceTask, ...]:
    """The tasks of a file, whose folder no run sees. Raises BadData."""
    keep_private(path.parent)
    try:
        return _parsed(path, path.stat().st_mtime_ns)
    except (OSError, UnicodeDecodeError) as error:
        raise BadData(f"can't read {path}: {error}; give a file of workspace tasks") from error


@lru_cache(maxsize=_KEPT_FILES)
def _parsed(path: Path, changed: int) -> tuple[WorkspaceTask, ...]:
    """The tasks of a file as it was ``changed``."""
    return parse_workspaces(path.read_text(encoding="utf-8-sig"), str(path))


_ALIASES = "\nglobals().update({{name: solve for name in {names!r} if name not in globals()}})\n"


def _defined(path: str, text: str) -> list[str]:
    """The names that a module's functions and classes have; none of what is no Python."""
    return [
        node.name
        for node in ast.parse(text if path.endswith(".py") else "").body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    ]


@contextmanager
def _telling(path: str) -> Iterator[None]:
    """What is wrong with a file that the model named, for it to read."""
    try:
        yield
    except BadConfig as error:
        raise ToolError(str(error)) from error
    except OSError as error:
        raise ToolError(f"{path[:200]!r}: {error.strerror or 'no regular file'}") from error


def _inside(path: str) -> str:
    """``path`` as a sandbox takes it, where it begins with './' or where the repository lies."""
    path = path.removeprefix(_WORK)
    while path.startswith("./"):
        path = path[2:]
    return path


def _end(result: ExecResult) -> str:
    """How a command ended; "" where it ended well."""
    ends = {"ok": "", "error": f"exit code {result.exit_code}", "signal": f"ended by signal {result.signal}"}
    return ends.get(result.status, f"ended at the {result.status} limit")


def _shown(result: ExecResult) -> str:
    """Output, errors and how it ended."""
    # One character for each byte that is no text, until what is cut has been counted.
    text = (result.stdout + result.stderr).decode(errors="surrogateescape")
    if len(text) > _MOST_SHOWN:
        half = _MOST_SHOWN // 2
        cut = len(text[half:-half].encode(errors="surrogateescape")) + result.truncated
        text = f"{text[:half]}\n[cut: {cut} bytes]\n{text[-half:]}"
    elif result.truncated:
        text = f"{text}\n[cut: {result.truncated} bytes of its middle]"
    text = text.encode(errors="surrogateescape").decode(errors="replace").rstrip("\n")
    end = _end(result)
    return "\n".join(filter(None, [text, end and f"[{end}]"])) or "[no output]"
