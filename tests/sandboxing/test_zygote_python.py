"""A zygote's warm Python beside a fresh one: the same code must do the same, to the byte."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from agentrl.registry import make_sandbox
from agentrl.sandbox import Limits, Sandbox


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    backend = make_sandbox("zygote", zygotes=1)
    survey = backend.survey()
    if not survey.available or survey.missing:
        pytest.skip(f"no full zygote here: {survey.note} {dict(survey.missing)}")
    yield backend.open(Limits(cpu_s=20, wall_s=60))
    backend.close()


_INPUT = b"some input\r\nof lines\rthat end so\n"
_REPLACED = "import atexit, io, os, sys\nold = sys.stdout; sys.stdout = io.StringIO()\n"
_WRAPPER = """
import os, sys
class Wrapper:
    def __init__(self, stream): self.stream = stream
    def write(self, text): self.stream.write(text)
    def flush(self): self.stream.flush()
"""
# As in the templates of programming contests.
_FAST_IO = """
import os, sys
from io import BytesIO, IOBase
class FastIO(IOBase):
    newlines = 0
    def __init__(self, file):
        self._fd = file.fileno()
        self.buffer = BytesIO()
        self.writable = "x" in file.mode or "r" not in file.mode
        self.write = self.buffer.write if self.writable else None
    def readline(self):
        while self.newlines == 0:
            b = os.read(self._fd, max(os.fstat(self._fd).st_size, 8192))
            self.newlines = b.count(b"\\n") + (not b)
            ptr = self.buffer.tell()
            self.buffer.seek(0, 2), self.buffer.write(b), self.buffer.seek(ptr)
        self.newlines -= 1
        return self.buffer.readline()
    def flush(self):
        if self.writable:
            os.write(self._fd, self.buffer.getvalue())
            self.buffer.truncate(0), self.buffer.seek(0)
class IOWrapper(IOBase):
    def __init__(self, file):
        self.buffer = FastIO(file)
        self.flush = self.buffer.flush
        self.writable = self.buffer.writable
        self.write = lambda s: self.buffer.write(s.encode("ascii"))
        self.readline = lambda: self.buffer.readline().decode("ascii")
sys.stdin, sys.stdout = IOWrapper(sys.stdin), IOWrapper(sys.stdout)
input = lambda: sys.stdin.readline().rstrip("\\r\\n")
"""
_LIKE_A_FRESH_ONE = {
    "print(__name__, __file__ if '__file__' in globals() else None, __spec__, __doc__)": (),
    "import sys; print(sys.argv, sys.path[0] == '')": ("-x", "é\n", "c d"),
    "import sys; print(sys.stdin.read().upper(), sys.stdin.encoding, sys.stdin.errors, sys.stdin.name)": (),
    "import sys; print(sys.stdout.line_buffering, sys.stdout.errors, sys.stderr.line_buffering)": (),
    "import sys; print(sys.stdout.mode, sys.stdin.mode, sys.__stdout__ is sys.stdout, sys.stdout.name)": (),
    "import sys; sys.exit(3)": (),
    "import sys; sys.exit('a word')": (),
    "import sys; print('kept', end=''); sys.exit()": (),
    "raise SystemExit(256 + 7)": (),
    "import os; print('lost', end=''); os._exit(5)": (),
    "def f():\n    return 1 / 0\nf()": (),
    "try:\n    {}['a']\nexcept KeyError as e:\n    raise ValueError('b') from e": (),
    "print('x'\n": (),
    "import sys; sys.excepthook = lambda *a: print('hooked', a[0].__name__); 1 / 0": (),
    "import atexit; atexit.register(print, 'last'); print('first')": (),
    "import threading, time\nthreading.Thread(target=lambda: (time.sleep(0.2), print('joined'))).start()": (),
    "class A:\n    def __del__(self): print('dropped')\na = A()": (),
    "import os, sys; print('before', flush=True); os.close(1); print('after')": (),
    "import os, signal; os.kill(os.getpid(), signal.SIGTERM)": (),
    "import os; os.abort()": (),
    "import signal; signal.raise_signal(signal.SIGINT)": (),
    "import signal as s; print(s.getsignal(s.SIGPIPE), s.getsignal(s.SIGCHLD), s.pthread_sigmask(0, ()))": (),
    "import os\nif os.fork() == 0:\n    print('child')\nelse:\n    os.wait(); print('parent')": (),
    "import multiprocessing as m; q = m.SimpleQueue(); p = m.Process(target=q.put, args=(4,)); p.start()\n"
    "print(q.get()); p.join()": (),
    "import sys; print('\\ud800', '\\udc80' == sys.argv[1])": ("\udc80",),
    "from __future__ import annotations\ndef f(a: nowhere): pass\nprint(f.__annotations__)": (),
    "import __main__; x = 4; print(__main__.x, vars(__main__) is globals())": (),
    # streams of the program's own, and what is written behind them
    _REPLACED + "@atexit.register\ndef f(): sys.__stdout__.write(sys.stdout.getvalue())\nprint(1)": (),
    _REPLACED + "print(1); old.write(sys.stdout.getvalue() + 'end')": (),
    _REPLACED + "print(1, file=sys.__stdout__)": (),
    _REPLACED + "sys.stderr = sys.stdout; sys.__stderr__.write('a line\\nand no more')": (),
    _REPLACED + "old.write('lost'); os.close(1)": (),
    _REPLACED + "sys.stdout = sys.__stdout__ = None": (),
    _REPLACED + "del sys.stdout, sys.__stdout__": (),
    _REPLACED + "sys.stdout = os.fdopen(1, 'w'); print('by another file')": (),
    _REPLACED + "sys.stdout = io.TextIOWrapper(old.buffer, 'latin-1'); print('\xe9', end='')": (),
    _REPLACED + "sys.stdout = io.TextIOWrapper(old.detach(), 'latin-1'); print('\xe9', end='')": (),
    _WRAPPER + "sys.stdout = Wrapper(sys.stdout); print('no attribute closed', end='')": (),
    _WRAPPER + "def flush(self): raise ValueError('unwilling')\nWrapper.flush = flush\n"
    "Wrapper.__repr__ = lambda self: 'Wrapper'\nsys.stdout = Wrapper(sys.stdout); print('kept')": (),
    _WRAPPER + "Wrapper.flush = None; sys.stderr = Wrapper(sys.stderr); print('kept')": (),
    _WRAPPER + "Wrapper.__del__ = lambda self: os.write(1, b'gone'); sys.stdout = Wrapper(sys.stdout)": (),
    _WRAPPER
    + "Wrapper.closed = property(lambda self: 1 / 0); sys.stdout = Wrapper(sys.stdout); print(1)": (),
    _FAST_IO + "print(input().upper())\nprint('é' == '\\xe9')": (),
    _FAST_IO + "print(1)\nraise ValueError": (),
    "import os\nclass A:\n    def __del__(self): os.write(1, b'its globals are there')\na = A()": (),
    "import __main__\nclass A:\n    def __del__(self): print('gone', A)\na = A(); b = [a]; b.append(b)": (),
    "class A:\n    def __del__(self): print('dropped')\ndef f(): a = A(); 1 / 0\nf()": (),
    "import sys, os\nclass A:\n    def __del__(self): print('x', end=''); os.close(1)\na = A()": (),
    "import pickle\nclass A: pass\nprint(type(pickle.loads(pickle.dumps(A()))))": (),
    "import sys\nprint(repr(sys.stdin.read()))": (),
    "print(repr(input()), repr(input()))": (),
    # a file, its buffer and its text, in a circle with the functions of the program
    "out = open(1, 'w')\ndef main(): out.write('kept')\nmain()": (),
    "import io\nout = io.BufferedWriter(io.FileIO(1, 'w'))\ndef main(): out.write(b'kept')\nmain()": (),
    "class Out:\n    out = open(1, 'w')\n    def say(self): self.out.write('kept')\nOut().say()": (),
    "import functools, os\nprint = functools.partial(print, file=os.fdopen(1, 'w'))\n"
    "def main(): print('kept')\nmain()": (),
    "class A:\n    def __del__(self): print('gone')\na = A(); _b = [a, A()]; a.b = _b\ndef f(): a": (),
    "import __main__, sys\nsys.modules['kept'] = __main__\n_a = open(1, 'w'); _a.write('kept')": (),
}


@pytest.mark.parametrize("code", _LIKE_A_FRESH_ONE)
def test_python_code_does_what_it_does_in_a_fresh_python(sandbox: Sandbox, code: str) -> None:
    words = _LIKE_A_FRESH_ONE[code]
    fresh = subprocess.run(
        [
            getattr(sys, "_base_executable", sys.executable),
            "-c",
            code,
            *(os.fsencode(word) for word in words),
        ],
        input=_INPUT,
        capture_output=True,
        env={"LANG": "C.UTF-8"},
        timeout=60,
    )
    ours = sandbox.run(["python3", "-c", code, *words], stdin=_INPUT)
    code_or_signal = ours.exit_code if ours.exit_code is not None else -(ours.signal or 0)
    assert (code_or_signal, ours.stdout, ours.stderr) == (fresh.returncode, fresh.stdout, fresh.stderr)


def test_a_script_has_its_file_its_folder_and_its_lines_in_tracebacks(sandbox: Sandbox) -> None:
    files = {
        "a/main.py": b"import near, sys\nprint(__file__, sys.argv)\nnear.f()\n",
        "a/near.py": b"def f(): 1/0\n",
    }
    result = sandbox.run(["python3", "a/main.py", "x"], files=files)
    assert result.stdout == b"/work/a/main.py ['a/main.py', 'x']\n"
    assert b'File "/work/a/main.py", line 3, in <module>\n    near.f()\n' in result.stderr
    assert b'File "/work/a/near.py", line 1, in f\n' in result.stderr
    assert result.stderr.count(b"File ") == 2
    assert sandbox.run(["python3", "-I", "a/main.py"]).stderr.count(b"ModuleNotFoundError") == 1
    assert sandbox.run(["python3", "none.py"]).exit_code == 2
