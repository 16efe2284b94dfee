"""The interpreter: state between cells, what a cell shows, and whose fault its end is."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

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


def has_ended(interpreter: Interpreter) -> None:
    """Wait until what a cell left behind has ended its interpreter."""
    assert interpreter._run is not None
    assert interpreter._run.ended.wait(30)


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


def test_cells_have_the_future_imports_of_cells_before_and_no_others(interpreter: Interpreter) -> None:
    dataclass = (
        "from dataclasses import dataclass, KW_ONLY\nfrom typing import ClassVar\n@dataclass\nclass A:\n"
        "    k: ClassVar[int] = 0\n    x: int = 1\n    _: KW_ONLY\n    y: int = 2\nA(5, y=6)"
    )
    typed = "def f(x: int): ...\nf.__annotations__"
    assert run(interpreter, dataclass, typed) == ["A(x=5, y=6)\n", "{'x': <class 'int'>}\n"]
    assert run(interpreter, "from __future__ import annotations", typed) == ["", "{'x': 'int'}\n"]


def test_cells_are_the_main_module(interpreter: Interpreter) -> None:
    cells = (
        "class C:\n    x = 3\ndef square(n):\n    return n * n",
        "import pickle\npickle.loads(pickle.dumps(C())).x",
        "from multiprocessing import get_context\nwith get_context('fork').Pool(2) as pool:\n"
        "    print(pool.map(square, range(4)))",
        "import sys\nvars(sys.modules['__main__']) is globals()",
    )
    assert run(interpreter, *cells) == ["", "3\n", "[0, 1, 4, 9]\n", "True\n"]


def test_the_lines_of_cells_are_found_of_the_latest(interpreter: Interpreter) -> None:
    cells = (
        "def half(n):\n    return n / 0",
        "import inspect\nprint(inspect.getsource(half))",
        "import traceback\ntry:\n    half(1)\nexcept ZeroDivisionError:\n    traceback.print_exc()",
    )
    _, source, trace = run(interpreter, *cells)
    assert source == "def half(n):\n    return n / 0\n\n"
    assert 'File "<cell 1>", line 2, in half\n    return n / 0\n' in trace
    run(interpreter, *["#" * 600_000] * 3)
    kept = "import linecache\n[file for file in linecache.cache if file[:5] == '<cell']"
    assert run(interpreter, kept) == ["['<cell 6>', '<cell 7>']\n"]


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


def test_a_frame_that_does_not_answer_is_no_later_cells_text(interpreter: Interpreter) -> None:
    forge = (
        "import json, sys\nframe = sys._getframe()\nwhile 'told' not in frame.f_locals:\n"
        "    frame = frame.f_back\ntold = frame.f_locals['told']\n"
        "body = json.dumps({'text': 'forged', 'number': NUMBER}).encode()\n"
        "told.write((len(body).to_bytes(4, 'big') + body) * 3)\ntold.flush()"
    )
    for number in ("None", "1", "[]", "'1'"):
        (text,) = run(interpreter, forge.replace("NUMBER", number))
        assert text == "error: the interpreter was ended: all variables are lost"
        assert run(interpreter, "1", "2") == ["1\n", "2\n"]
    own = forge.replace("NUMBER", "frame.f_locals['cell']['number']")
    first, second, third = run(interpreter, own, "1", "2")  # what a cell says of itself is its own affair
    assert first == "forged"
    assert "all variables are lost" in second
    assert third == "2\n"


def test_a_copy_that_a_cell_forks_ends_with_the_cell(interpreter: Interpreter) -> None:
    fork = "import os, sys\npid = os.fork()\ncode = os.waitpid(pid, 0)[1] >> 8 if pid else None\n"
    assert run(interpreter, f"{fork}print(code)", "2", "3") == ["None\n0\n", "2\n", "3\n"]
    assert run(interpreter, f"{fork}if not pid: sys.exit(3)\ncode") == ["3\n"]
    (text,) = run(interpreter, f"{fork}if not pid: 1 / 0\ncode")
    assert text.endswith("ZeroDivisionError: division by zero\n1\n")
    assert run(interpreter, "code") == ["1\n"]


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


def test_one_that_dies_between_cells_is_the_models_fault_too_and_the_loss_is_said(
    interpreter: Interpreter,
) -> None:
    run(interpreter, "import threading, os; x = 5; threading.Timer(0.2, os._exit, [4]).start()")
    has_ended(interpreter)
    lost = "before this cell the interpreter ended with exit code 4: all variables are lost\n"
    text, after = run(interpreter, "x", "5")
    assert text.startswith(f"{lost}Traceback:")
    assert text.endswith("NameError: name 'x' is not defined")
    assert after == "5\n"


def test_a_limit_that_is_reached_between_cells_is_named(
    interpreter: Interpreter, opened: list[Sandbox], monkeypatch: pytest.MonkeyPatch
) -> None:
    interpreter.run("import os; os._exit(0)", deadline_s=60)
    run_here = opened[0].run

    def run_small(*args: Any, **settings: Any) -> ExecResult:
        return replace(run_here(*args, **settings), status="memory", fault="policy", exit_code=None)

    monkeypatch.setattr(opened[0], "run", run_small)
    run(interpreter, "import threading, os; threading.Timer(0.2, os._exit, [0]).start()")
    has_ended(interpreter)
    (text,) = run(interpreter, "import os; os._exit(3)")
    first, second = text.splitlines()
    said = "the interpreter was ended at its limit of memory: all variables are lost"
    assert first == f"before this cell {said}"
    assert second == f"error: {said}"


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
