"""The interpreter: state between cells, what a cell shows, and whose fault its end is."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import pytest

from agentrl.interpreter import Interpreter
from agentrl.registry import make_sandbox
from agentrl.sandbox import ExecResult, Limits, Sandbox, SandboxLost, Talk

_TRUSTED = Limits(
    cpu_s=None, wall_s=None, memory_mib=None, pids=None, disk_mib=None, output_kib=64, network=True
)


@pytest.fixture
def opened() -> Iterator[list[Sandbox]]:
    backend = make_sandbox("process")
    sandboxes: list[Sandbox] = []
    yield sandboxes
    backend.close()


@pytest.fixture
def interpreter(opened: list[Sandbox]) -> Iterator[Interpreter]:
    backend = make_sandbox("process")

    def open_sandbox() -> Sandbox:
        opened.append(backend.open(_TRUSTED))
        return opened[-1]

    made = Interpreter(open_sandbox, most_bytes=400)
    yield made
    made.close()
    backend.close()


def run(interpreter: Interpreter, *cells: str, deadline_s: float = 60.0) -> list[str]:
    return [interpreter.run(cell, deadline_s=deadline_s) for cell in cells]


def test_variables_and_functions_and_files_stay(interpreter: Interpreter) -> None:
    cells = (
        "x = 3",
        "def f(n):\n    return n + x",
        "open('kept', 'w').write('y')",
        "f(4), open('kept').read()",
    )
    assert run(interpreter, *cells) == ["", "", "1\n", "(7, 'y')\n"]


def test_output_comes_in_its_order_also_of_children(interpreter: Interpreter) -> None:
    cell = "import os, sys\nprint(1)\nos.system('echo 2')\nprint(3, file=sys.stderr)\n4"
    assert run(interpreter, cell) == ["1\n2\n3\n4\n"]


@pytest.mark.parametrize(
    ("cell", "shown"),
    [
        ("1 / 0", "Traceback:\n  cell 1, line 1, in <module>\nZeroDivisionError: division by zero"),
        ("print(1)\nraise ValueError('no')", "1\nTraceback:\n  cell 1, line 2, in <module>\nValueError: no"),
        ("(", "line 1\n    (\n    ^\nSyntaxError: '(' was never closed"),
        ("exit()", "Traceback:\n  cell 1, line 1, in <module>\nSystemExit: None"),
        ("'\ud800'", "UnicodeEncodeError"),
        ("None", ""),
    ],
)
def test_an_error_is_shown_in_short(interpreter: Interpreter, cell: str, shown: str) -> None:
    (text,) = run(interpreter, cell)
    assert text.startswith(shown)
    assert "interpreter" not in text  # no frame of ours


def test_the_interpreter_survives_what_a_cell_does_to_its_streams(interpreter: Interpreter) -> None:
    *_, last = run(
        interpreter, "import sys; sys.stdout.close()", "sys.stdin = sys.stderr = None", "exit()", "5"
    )
    assert last == "5\n"
    assert "EOFError" in run(interpreter, "input()")[0]


def test_head_and_tail_of_much_output_are_shown(interpreter: Interpreter) -> None:
    (text,) = run(interpreter, "print('a' * 1000 + 'z' * 1000)")
    assert text.startswith("aaa")
    assert text.endswith("zzz\n")
    assert "[cut: 1601 bytes]" in text
    assert len(text) < 500


@pytest.mark.parametrize(
    "cell", ["raise ValueError('y' * 30_000)", "{}['k' * 30_000]", "x = " + "1 + " * 10_000, "1 +\x00"]
)
def test_a_long_error_is_cut_and_costs_no_state(interpreter: Interpreter, cell: str) -> None:
    interpreter.run("kept = 42", deadline_s=5)
    text = interpreter.run(f"print('before' * 50)\n{cell}", deadline_s=5)
    assert "Error" in text
    assert len(text) < 600
    assert interpreter.run("kept", deadline_s=5) == "42\n"


def test_what_is_written_to_the_protocols_descriptors_is_no_frame(interpreter: Interpreter) -> None:
    noise = (
        "import os, contextlib\nfor fd in range(3, 20):\n    with contextlib.suppress(OSError):\n"
        "        os.write(fd, b'x' * 64)"
    )
    (text,) = run(interpreter, noise)
    assert text == "error: the interpreter was ended: all variables are lost"
    assert run(interpreter, "1 + 1") == ["2\n"]


def test_a_cell_that_takes_too_long_costs_the_state_and_the_next_has_a_new_sandbox(
    interpreter: Interpreter, opened: list[Sandbox]
) -> None:
    run(interpreter, "x = 1")
    (text,) = run(interpreter, "while True: pass", deadline_s=0.3)
    assert text == "error: the cell took longer than 0.3 s: all variables and files are lost"
    assert "NameError" in run(interpreter, "x")[0]
    assert len(opened) == 2


def test_a_cell_that_ends_the_interpreter_keeps_the_files(
    interpreter: Interpreter, opened: list[Sandbox]
) -> None:
    first, second, *_ = run(interpreter, "open('kept', 'w').write('y')", "import os; os._exit(3)")
    assert (first, second) == ("1\n", "error: the interpreter ended with exit code 3: all variables are lost")
    assert run(interpreter, "open('kept').read()") == ["'y'\n"]
    assert "signal 9" in run(interpreter, "import os; os.kill(os.getpid(), 9)")[0]
    assert len(opened) == 1


def test_files_that_keep_an_interpreter_from_starting_are_the_models_loss(
    interpreter: Interpreter, opened: list[Sandbox], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(interpreter, "open('kept', 'w').write('y')", "import os; os._exit(0)")
    monkeypatch.setattr(opened[0], "run", _Dumb().run)
    assert run(interpreter, "import os; os.path.exists('kept')", "2") == [
        "no interpreter starts among the files that were left: all files are lost\nFalse\n",
        "2\n",
    ]
    assert len(opened) == 2


def test_one_that_dies_between_cells_is_the_models_fault_too(interpreter: Interpreter) -> None:
    run(interpreter, "import threading, os; threading.Timer(0.2, os._exit, [4]).start()")
    time.sleep(1.5)
    assert run(interpreter, "5") == ["5\n"]


def test_a_sandbox_that_goes_away_is_the_worlds_fault(
    interpreter: Interpreter, opened: list[Sandbox]
) -> None:
    run(interpreter, "x = 1")
    timer = threading.Timer(0.3, opened[0].close)
    timer.start()
    with pytest.raises(SandboxLost):
        run(interpreter, "import time; time.sleep(60)")
    timer.join()


class _Dumb:
    """A sandbox whose python3 ends at once."""

    def run(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes | Talk = b"",
        files: Mapping[str, bytes] | None = None,
        limits: Limits | None = None,
    ) -> ExecResult:
        return ExecResult(status="error", fault="policy", exit_code=127, stderr=b"no python3")

    def read(self, path: str, *, most_bytes: int = 1 << 20) -> bytes:
        raise FileNotFoundError

    def write(self, path: str, data: bytes) -> None:
        raise OSError

    def close(self) -> None:
        pass


def test_a_python_that_does_not_start_is_the_worlds_fault() -> None:
    make: Callable[[], Sandbox] = _Dumb
    with pytest.raises(SandboxLost, match="did not start.*no python3"):
        Interpreter(make, most_bytes=10).run("1", deadline_s=1)


def test_a_closed_one_leaves_no_thread(interpreter: Interpreter) -> None:
    run(interpreter, "x = 1")
    interpreter.close()
    interpreter.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "agentrl-interpreter"]
    with pytest.raises(SandboxLost, match="is closed"):
        run(interpreter, "x")
