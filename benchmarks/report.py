"""What the benchmarks share: a table on the terminal, the same rows as JSON, and their common options."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.table import Table

__all__ = ["Row", "make_parser", "missing", "report"]

Row = Mapping[str, str | float | int | None]  # by column; None where the column does not apply


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with ``--json PATH`` and ``--quick``; the description is a module's docstring."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the rows as a JSON list")
    parser.add_argument("--quick", action="store_true", help="a run so short that its figures mean nothing")
    return parser


def missing(peer: str, *, module: str) -> list[str]:
    """The note that a peer is not measured, where its ``module`` is not installed."""
    return [] if find_spec(module) else [f"{peer} is not installed here: pip install -e '.[bench]'"]


def report(rows: Sequence[Row], *, title: str, notes: Sequence[str] = (), json_path: Path | None) -> None:
    """Print one table with ``notes`` below it, and write ``rows`` to ``json_path`` where there is one."""
    table = Table()
    for column in rows[0]:
        table.add_column(column, justify="left" if column == "name" else "right")
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    for part in (title, table, *notes):
        Console(width=120).print(part, highlight=False, markup=False)
    if json_path is not None:
        json_path.write_text(json.dumps(list(rows), indent=1) + "\n", encoding="utf-8")


def _cell(value: str | float | int | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)
