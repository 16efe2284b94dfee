"""What runs as the interpreter inside a sandbox: cells in, what they showed out, one after the other.

A frame is a length in four bytes, big-endian, and JSON: ``{"number", "code", "most"}`` comes in, ``{"number",
"text"}`` goes out with the number that came in; ``{"number", "ping"}`` is answered at once, and a first one
with number null and text "" says that it is ready. Everything that a cell and its children write to their
stdout and stderr goes to one file without a name, so that its order is kept, none of it can be taken for a
frame, and the disk's limit bounds it. Cells are ``__main__`` to all that looks: pickle, multiprocessing,
inspect (not for classes, whose module would need a file). Standard library only and Python 3.8: it is sent
as source, for ``python3 -I -c``.
"""

from __future__ import annotations
import __future__

import ast
import builtins
import io
import json
import linecache
import os
import sys
import tempfile
import traceback
from contextlib import suppress
from types import CodeType, ModuleType
from typing import Any, BinaryIO, NoReturn

__all__ = ["main"]

_LONGEST_REPR = 1_000_000  # characters of a last expression's value that are written
_KEPT_SOURCE = 1_000_000  # characters of cells that tracebacks can quote, the latest; each is 1000 at least
_FUTURES = sum(getattr(__future__, name).compiler_flag for name in __future__.all_feature_names)  # a bit each


def main() -> None:
    """Serve until stdin ends."""
    asked, told = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    written = _redirect()
    sys.path.insert(0, "")  # modules of the working directory: not before our own are here
    _open_streams()
    cells = _Cells()
    _tell(told, None, "")
    while True:
        cell = _ask(asked)
        if cell is None:
            return
        if "ping" in cell:
            _tell(told, cell["number"], "")
            continue
        _open_streams()
        error = cells.run(cell["code"])
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):  # closed or replaced by the cell: what it showed is lost, nothing else
                stream.flush()
        most, data = cell["most"], error.encode("utf-8", "replace")
        text, said = _taken(written, most - min(len(data), most // 2)), _cut(data, most // 2)
        _tell(told, cell["number"], text + ("\n" if text and said and text[-1] != "\n" else "") + said)


def _redirect() -> int:
    """Point descriptors 0 to 2 away from the protocol's; where 1 and 2 lead."""
    written, path = tempfile.mkstemp()
    appended = os.open(path, os.O_WRONLY | os.O_APPEND)
    os.unlink(path)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(appended, 1)
    os.dup2(appended, 2)
    return written


def _open_streams() -> None:
    """Whatever an earlier cell made of them."""
    sys.stdin = io.StringIO()
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        raw = io.FileIO(descriptor, "w", closefd=False)
        written = io.TextIOWrapper(io.BufferedWriter(raw), "utf-8", "replace", line_buffering=True)
        setattr(sys, name, written)


class _Cells:
    """Runs the cells, one after the other, in the namespace of ``__main__``."""

    def __init__(self) -> None:
        main = sys.modules["__main__"] = ModuleType("__main__")
        self._names: dict[str, Any] = main.__dict__
        self._names["__builtins__"] = builtins
        self._futures = 0  # of cells' "from __future__ import": they hold for the later ones, too
        self._count, self._process = 0, os.getpid()
        self._kept: list[tuple[str, int]] = []  # (file, what it counts) of the cells in linecache

    def run(self, code: str) -> str:
        """Execute a cell, show its last expression's value, and return its error as a text; "" for none."""
        self._count += 1
        file, said = f"<cell {self._count}>", ""
        end: Any = None  # as of a SystemExit
        try:
            self._keep(code, file)
            tree = ast.parse(code, file)
            last = tree.body[-1] if tree.body else None
            if isinstance(last, ast.Expr):
                tree.body.pop()
            exec(self._compiled(tree, file, "exec"), self._names)
            if isinstance(last, ast.Expr):
                value = eval(self._compiled(ast.Expression(last.value), file, "eval"), self._names)
                if value is not None:
                    sys.stdout.write(repr(value)[:_LONGEST_REPR] + "\n")
        except BaseException as error:  # a SystemExit, too: the interpreter goes on
            said = _told(error, file)
            end = error.code if isinstance(error, SystemExit) else said
        if os.getpid() != self._process:  # a copy that the cell forked: both would answer
            _leave(end)
        return said

    def _compiled(self, tree: ast.Module | ast.Expression, file: str, mode: str) -> CodeType:
        # Not inherited: "annotations", which this file has, would make strings of theirs.
        code: CodeType = compile(tree, file, mode, self._futures, dont_inherit=True)
        self._futures |= code.co_flags & _FUTURES
        return code

    def _keep(self, code: str, file: str) -> None:
        """Let tracebacks and inspect find the cell's lines, and drop the oldest."""
        lines = io.StringIO(code + "\n", newline=None).readlines()
        linecache.cache[file] = (len(code), None, lines, file)
        self._kept.append((file, max(len(code), 1000)))
        while sum(size for _, size in self._kept) > _KEPT_SOURCE:
            linecache.cache.pop(self._kept.pop(0)[0], None)


def _leave(end: Any) -> NoReturn:
    """End this process as ``SystemExit(end)`` would, without what is to be done at its exit."""
    if end is not None and not isinstance(end, int):
        with suppress(BaseException):
            print(end, file=sys.stderr)
        end = 1
    for stream in (sys.stdout, sys.stderr):
        with suppress(BaseException):
            stream.flush()
    os._exit((end or 0) & 0xFF)


def _told(error: BaseException, file: str) -> str:
    """A short traceback: the cell's own lines, and what was raised."""
    try:
        frames = [
            frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename[:6] == "<cell "
        ]
        lines = [f"  {frame.filename[1:-1]}, line {frame.lineno}, in {frame.name}" for frame in frames]
        said = "".join(traceback.format_exception_only(type(error), error)).replace(f'File "{file}", ', "")
        return "\n".join(["Traceback:"] * bool(lines) + lines[-3:] + [said.strip()])
    except BaseException:  # an exception whose text raises
        return "an error that can't be shown"


def _taken(written: int, most: int) -> str:
    """What was written since the last cell, head and tail of it; the file is emptied."""
    size = os.fstat(written).st_size
    if size <= most:
        data = os.pread(written, size, 0)
    else:
        head, tail = most - most // 2, most // 2
        cut = f"\n[cut: {size - most} bytes]\n".encode()
        data = os.pread(written, head, 0) + cut + os.pread(written, tail, size - tail)
    os.ftruncate(written, 0)
    return data.decode("utf-8", "replace")


def _cut(data: bytes, most: int) -> str:
    """Head and tail of what has more than ``most`` bytes."""
    if len(data) > most:
        tail = data[len(data) - most // 2 :]
        data = data[: most - most // 2] + f"\n[cut: {len(data) - most} bytes]\n".encode() + tail
    return data.decode("utf-8", "replace")


def _ask(asked: BinaryIO) -> Any:
    header = asked.read(4)
    return json.loads(asked.read(int.from_bytes(header, "big"))) if len(header) == 4 else None


def _tell(told: BinaryIO, number: Any, text: str) -> None:
    body = json.dumps({"number": number, "text": text}).encode()
    told.write(len(body).to_bytes(4, "big") + body)
    told.flush()


if __name__ == "__main__":
    main()
