"""What idle rows of a cache hold, found again by the longest past that a prompt begins with."""

from __future__ import annotations

__all__ = ["Pasts"]


class Pasts:
    """Token ids, as bytes, by row; a row holds one past or none."""

    def __init__(self, rows: int) -> None:
        self._held = [b""] * rows
        self._rows: dict[bytes, list[int]] = {}  # that hold the same
        self._sizes: dict[int, int] = {}  # bytes of a past -> different pasts of this size

    def __getitem__(self, row: int) -> bytes:
        """What ``row`` holds; b"" for nothing."""
        return self._held[row]

    def hold(self, row: int, past: bytes) -> None:
        """Let ``row`` hold ``past``, and nothing that it held before; b"" for nothing."""
        self._take_out(row)
        self._held[row] = past
        if not past:
            return
        if past not in self._rows:
            self._sizes[len(past)] = self._sizes.get(len(past), 0) + 1
        self._rows.setdefault(past, []).append(row)

    def swap(self, first: int, second: int) -> None:
        """Exchange what two rows hold."""
        one, other = self._held[first], self._held[second]
        self.hold(first, other)
        self.hold(second, one)

    def longest(self, prompt: bytes) -> tuple[int, int] | None:
        """A row whose past is a beginning of ``prompt``, shorter than it, and that past's bytes; of several,
        the longest past."""
        for size in sorted(self._sizes, reverse=True):
            if size < len(prompt) and (rows := self._rows.get(prompt[:size])):
                return rows[0], size
        return None

    def _take_out(self, row: int) -> None:
        past = self._held[row]
        if not past:
            return
        self._rows[past].remove(row)
        if not self._rows[past]:
            del self._rows[past]
            self._sizes[len(past)] -= 1
            if not self._sizes[len(past)]:
                del self._sizes[len(past)]
