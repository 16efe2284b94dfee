"""How the judge speaks with what it runs in sandboxes: programs of its own as source, and frames of JSON."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from agentrl.judging.comparing import Garbled, parse
from agentrl.judging.plain import HEADER_BYTES, MOST_BYTES, frame, frame_size
from agentrl.sandbox import Channel, Gone

__all__ = ["Line", "python"]

_PACKAGE = "agentrl.judging"
_SHARED = ("plain", "solution_process")  # what each of them needs, in the order in which it is loaded


class Line:
    """Frames over a channel. What the other end says is JSON within limits, or Garbled."""

    def __init__(self, channel: Channel, *, gone: type[Exception] = Gone) -> None:
        self._channel, self._gone = channel, gone
        self._heard = bytearray()

    def send(self, message: Any) -> None:
        """Raises what was given as ``gone`` where the other end is."""
        try:
            self._channel.send(frame(message))
        except Gone:
            raise self._gone from None

    def receive(self) -> list[Any]:
        """The next message, a list that is not empty. Raises Garbled, and ``gone``."""
        size = frame_size(self._take(HEADER_BYTES))
        if size > MOST_BYTES:
            raise Garbled("a message that is too large")
        message = parse(self._take(size))
        if type(message) is not list or not message:
            raise Garbled("a message that is no list")
        return message

    @property
    def has_more(self) -> bool:
        """Whether something was said that nobody asked for."""
        return bool(self._heard)

    def _take(self, size: int) -> bytes:
        try:
            while len(self._heard) < size:
                self._heard += self._channel.receive(1 << 16)
        except Gone:
            raise self._gone from None
        data = bytes(self._heard[:size])
        del self._heard[:size]
        return data


@cache
def python(module: str, *, function: str = "serve") -> tuple[str, ...]:
    """The command that runs ``function`` of one of our modules that go into sandboxes as source."""
    folder = Path(__file__).parent
    names = (*_SHARED, module) if module not in _SHARED else _SHARED[: _SHARED.index(module) + 1]
    sources = {"agentrl": "", _PACKAGE: ""}
    sources |= {f"{_PACKAGE}.{name}": (folder / f"{name}.py").read_text(encoding="utf-8") for name in names}
    # Gone from sys.modules when it serves: a solution imports its own modules, not these.
    return (
        "python3",
        "-I",
        "-c",
        f"import sys, types\nfor name, source in {sources!r}.items():\n"
        "    module = sys.modules[name] = types.ModuleType(name)\n"
        "    exec(compile(source, name, 'exec'), module.__dict__)\n"
        f"for name in {[*sources]!r}:\n    del sys.modules[name]\n"
        f"module.{function}()\n",
    )
