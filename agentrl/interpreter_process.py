"""What runs as the interpreter inside a sandbox: cells in, what they showed out, one after the other.

A frame is a length in four bytes, big-endian, and JSON: ``{"code", "most"}`` comes in, ``{"text"}`` goes out;
``{"ping"}`` is answered at once, and a first ``{"text": ""}`` says that it is ready. Everything that a cell
and its children write to their stdout and stderr goes to one file without a name, so that its order is kept,
none of it can be taken for a frame, and the disk's limit bounds it. Standard library only and Python 3.8:
it is sent as source, for ``python3 -I -c``.
"""

from __future__ import annotations

import ast
import builtins
import io
import json
import os
import sys
import tempfile
import traceback
from contextlib import suppress
from typing import Any, BinaryIO

__all__ = ["main"]

_LONGEST_REPR = 1_000_000  # characters of a last expression's value that are written


def main() -> None:
    """Serve until stdin ends."""
    asked, told = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    written = _redirect()
    sys.path.insert(0, "")  # modules of the working directory: not before our own are here
    _open_streams()
    names: dict[str, Any] = {"__name__": "__main__", "__builtins__": builtins}
    count = 0
    _tell(told, "")
    while True:
        cell = _ask(asked)
        if cell is None:
            return
        if "ping" in cell:
            _tell(told, "")
            continue
        count += 1
        _open_streams()
        error = _run(cell["code"], names, f"<cell {count}>")
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):  # closed or replaced by the cell: what it showed is lost, nothing else
                stream.flush()
        most, data = cell["most"], error.encode("utf-8", "replace")
        text, said = _taken(written, most - min(len(data), most // 2)), _cut(data, most // 2)
        _tell(told, text + ("\n" if text and said and text[-1] != "\n" else "") + said)


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


def _run(code: str, names: dict[str, Any], file: str) -> str:
    """Execute a cell, show its last expression's value, and return its error as a text; "" for none."""
    try:
        tree = ast.parse(code, file)
        last = tree.body[-1] if tree.body else None
        if isinstance(last, ast.Expr):
            tree.body.pop()
        exec(compile(tree, file, "exec"), names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), file, "eval"), names)
            if value is not None:
                sys.stdout.write(repr(value)[:_LONGEST_REPR] + "\n")
    except BaseException as error:  # a SystemExit, too: the interpreter goes on
        return _told(error, file)
    return ""


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


def _tell(told: BinaryIO, text: str) -> None:
    body = json.dumps({"text": text}).encode()
    told.write(len(body).to_bytes(4, "big") + body)
    told.flush()


if __name__ == "__main__":
    main()
