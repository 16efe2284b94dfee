"""What a command becomes in a process that the zygote forked for it: warm Python, or another program.

``python3 [-I] -c CODE ...`` and ``python3 [-I] FILE ...`` run in the interpreter that is there, with the
``__main__``, paths, streams, exit codes and tracebacks that a fresh one would have; all else is executed.
Not as in a fresh one: ``sys.flags`` are those of ``-I``, string hashes are the zygote's, and a frame or two
lie below the program's.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib.machinery
import io
import os
import signal
import sys
import threading
import types
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, NoReturn

__all__ = ["become"]

_join_threads: Callable[[], None] = threading._shutdown  # type: ignore[attr-defined]
_OURS = (lambda: None).__code__.co_filename
_flush_libc = ctypes.CDLL(None).fflush
_FLUSH_FAILED = 120  # Python's own exit code for output that can't be written


class _Program(NamedTuple):
    argv: list[str]  # the program's
    isolated: bool
    code: str | None  # None: argv[0] is a file


def become(argv: Sequence[str]) -> NoReturn:
    """Run ``argv`` in this process; never returns."""
    program = _warm_program(argv)
    if program is None:
        _execute(argv)
    _run(program, argv)


def _warm_program(argv: Sequence[str]) -> _Program | None:
    """What of a Python command line this interpreter can run itself; None for what it can't."""
    if argv[0] != "python3":
        return None
    rest = list(argv[1:])
    isolated = rest[:1] == ["-I"]
    rest = rest[isolated:]
    if rest[:1] == ["-c"] and len(rest) > 1:
        return _Program(["-c", *rest[2:]], isolated, rest[1])
    if rest and rest[0] and not rest[0].startswith("-") and not os.path.isdir(rest[0]):
        return _Program(rest, isolated, None)
    return None


def _execute(argv: Sequence[str]) -> NoReturn:
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them
        signal.signal(number, signal.SIG_DFL)
    words = [sys.executable, *argv[1:]] if argv[0] == "python3" else list(argv)
    try:
        os.execvp(words[0], words)
    except OSError as error:
        os.write(2, f"{argv[0]}: {error.strerror}\n".encode(errors="replace"))
        os._exit(127 if isinstance(error, FileNotFoundError) else 126)
    except ValueError as error:  # a NUL in a word
        os.write(2, f"{argv[0]!r}: {error}\n".encode(errors="replace"))
        os._exit(127)


def _run(program: _Program, argv: Sequence[str]) -> NoReturn:
    main = types.ModuleType("__main__")
    source = program.code if program.code is not None else _read(program.argv[0])
    if source is None:
        _execute(argv)  # a zip file with a program in it
    _look_fresh(program, argv, main)
    status = 0
    try:
        name = "<string>" if program.code is not None else main.__dict__["__file__"]
        exec(compile(source, name, "exec", dont_inherit=True), main.__dict__)
    except SystemExit as error:
        status = _exit_code(error.code)
    except KeyboardInterrupt as error:
        _report(error)
        status = -signal.SIGINT
    except BaseException as error:
        _report(error)
        status = 1
    remains = weakref.ref(main)
    del main
    _finish(status, remains)


def _read(path: str) -> bytes | None:
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        text = f"{sys.executable}: can't open file {os.path.abspath(path)!r}: [Errno {error.errno}] "
        os.write(2, f"{text}{error.strerror}\n".encode(errors="replace"))
        os._exit(2)
    return None if data.startswith(b"PK\x03\x04") else data


def _look_fresh(program: _Program, argv: Sequence[str], main: types.ModuleType) -> None:
    """Set what a program may look at as if the interpreter had begun with it."""
    sys.modules["__main__"] = main
    main.__dict__.update(__builtins__=sys.modules["builtins"], __annotations__={})
    sys.argv = list(program.argv)
    sys.orig_argv = list(argv)
    if program.code is not None:
        main.__loader__ = importlib.machinery.BuiltinImporter
        first = ""
    else:
        path = os.path.abspath(program.argv[0])
        main.__dict__.update(__file__=path, __cached__=None)
        main.__loader__ = importlib.machinery.SourceFileLoader("__main__", path)
        first = os.path.dirname(os.path.realpath(path))
    if not program.isolated:
        sys.path.insert(0, first)
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        stream = _stream(descriptor, name)
        for attribute in (name, f"__{name}__"):
            setattr(sys, attribute, stream)
    numpy = sys.modules.get("numpy")
    if numpy is not None:  # random itself has seeded anew when this process was forked
        numpy.random.seed()


def _stream(descriptor: int, name: str) -> io.TextIOWrapper:
    raw = io.FileIO(descriptor, "r" if name == "stdin" else "w", closefd=False)
    buffer = io.BufferedReader(raw) if name == "stdin" else io.BufferedWriter(raw)
    stream = io.TextIOWrapper(
        buffer,
        encoding="utf-8",
        newline="\n",
        errors="backslashreplace" if name == "stderr" else "surrogateescape",
        line_buffering=name == "stderr",
    )
    for thing, attribute, value in ((raw, "name", f"<{name}>"), (stream, "mode", raw.mode[0])):
        setattr(thing, attribute, value)
    return stream


def _exit_code(code: object) -> int:
    if code is None:
        return 0
    if isinstance(code, int):
        return code & 0xFF if abs(code) < 1 << 63 else 0xFF
    with suppress(BaseException):
        print(code, file=sys.stderr)
    return 1


def _report(error: BaseException) -> None:
    """Print a traceback the way the interpreter does, without the frames below the program's."""
    trace = _trace(error)
    error.__traceback__ = trace
    sys.last_type, sys.last_value, sys.last_traceback = type(error), error, trace
    try:
        sys.excepthook(type(error), error, trace)
    except BaseException:
        sys.__excepthook__(type(error), error, trace)


def _trace(error: BaseException) -> types.TracebackType | None:
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename == _OURS:
        trace = trace.tb_next
    return trace


def _finish(status: int, main: weakref.ref[types.ModuleType]) -> NoReturn:
    """End as an interpreter does (Py_FinalizeEx), in its order.

    Threads are joined, exit handlers called and the program's streams flushed. Then its module, the last
    references to which are the interpreter's, is dropped while the first streams are back in place, so that
    what its objects say as they go is written, too; of these last words no failure is told. A collection
    while everything is there leaves a file before its buffers in the order in which the next one ends them:
    without it those of a module with functions, which is a circle, would be closed before they are written.
    """
    with suppress(BaseException):
        _join_threads()
    with suppress(BaseException):
        atexit._run_exitfuncs()
    if not _flush():
        status = _FLUSH_FAILED
    sys.last_type = sys.last_value = sys.last_traceback = None
    for name in ("stdin", "stdout", "stderr"):
        setattr(sys, name, getattr(sys, f"__{name}__", None))
    gc.collect()
    sys.modules.pop("__main__", None)
    gc.collect()
    left = main()
    if left is not None:  # as _PyModule_Clear does it
        names = [name for name in left.__dict__ if name != "__builtins__"]
        for name in sorted(names, key=lambda name: not name.startswith("_") or name.startswith("__")):
            left.__dict__[name] = None
    for stream in (sys.stdout, sys.stderr):
        with suppress(BaseException):
            stream.flush()
    _flush_libc(None)
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


def _flush() -> bool:
    """Whether what the program printed is written; where not, it is told as the interpreter tells it."""
    out, err = getattr(sys, "stdout", None), getattr(sys, "stderr", None)
    done = True
    try:
        if out is not None and not _is_closed(out):
            out.flush()
    except BaseException as error:
        done = False
        with suppress(BaseException):
            print(f"Exception ignored in: {out!r}", file=sys.stderr)
            sys.__excepthook__(type(error), error.with_traceback(_trace(error)), _trace(error))
    try:
        if err is not None and not _is_closed(err):
            err.flush()
    except BaseException:
        done = False
    return done


def _is_closed(stream: Any) -> bool:
    with suppress(BaseException):
        return bool(stream.closed)
    return False
