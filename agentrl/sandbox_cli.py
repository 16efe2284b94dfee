"""The commands of ``agentrl sandbox``: doctor, selfcheck."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from agentrl.attacks.selfcheck import Row

__all__ = ["sandbox_app"]

sandbox_app = typer.Typer(
    no_args_is_help=True,
    help="Sandboxes for untrusted code: what this host can enforce, and whether it holds.",
)

_STYLES = {"held": "green", "BROKEN": "bold red", "not enforced": "yellow", "not tried": "yellow"}


@sandbox_app.command()
def doctor() -> None:
    """Show what each backend enforces on this host, by what means, and what to install."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from agentrl.errors import BadConfig
    from agentrl.sandbox import GUARANTEES, LIMITS, Limits
    from agentrl.sandboxing.doctor import INSTALL, strongest, survey_all

    console = Console()
    surveys = survey_all()
    table = Table("", *surveys, title="What is enforced here", title_justify="left")
    for what in (*LIMITS, *GUARANTEES):
        cells = [
            "-" if not survey.available else "yes" if what in survey.enforced else "NO"
            for survey in surveys.values()
        ]
        table.add_row(what, *cells)
    console.print(table)
    for name, survey in surveys.items():
        console.print(Text(f"\n{name}: {survey.note}" if survey.available else f"\n{name} is not available"))
        if not survey.available:
            console.print(Text(f"  {survey.note}\n  needs: {INSTALL.get(name, 'see its documentation')}"))
        for what, how in survey.enforced.items():
            console.print(Text(f"  {what}: {how}"))
        for what, why in survey.missing.items():
            console.print(Text(f"  {what} is NOT enforced: {why}"))
    try:
        backend = strongest(Limits())
    except BadConfig as error:
        console.print(Text(f"\nno default: {error}"))
        raise typer.Exit(1) from None
    note = backend.survey().note
    backend.close()
    console.print(Text(f"\nthe default, 'auto', is {backend.name}" + (f" ({note})" if note else "")))


@sandbox_app.command()
def selfcheck(
    backend: Annotated[
        str, typer.Option(help="A name of 'agentrl sandbox doctor', or 'package.module:Name' of your own.")
    ],
    adversarial: Annotated[
        bool,
        typer.Option("--adversarial", help="Also try every known attack, on the sandbox and on verdicts."),
    ] = False,
    only: Annotated[str, typer.Option(help="Names or groups of checks, with commas between.")] = "",
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Also write the report to this file.")
    ] = None,
) -> None:
    """Put a backend to its word on this host; exit code 1 if something broke."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from agentrl.attacks.selfcheck import self_check
    from agentrl.files import check_output, write_json

    check_output(json_path, key="--json")
    console = Console()

    def note(row: Row) -> None:
        if row.result == "BROKEN":
            console.print(Text(f"BROKEN {row.group}: {row.name}: {row.detail}", style=_STYLES["BROKEN"]))

    names = [name.strip() for name in only.split(",") if name.strip()]
    report = self_check(backend, adversarial=adversarial, only=names, on_row=note)
    table = Table("group", "check", "result", "detail", title=f"sandbox {backend}", title_justify="left")
    for row in report.rows:
        table.add_row(row.group, Text(row.name), Text(row.result, _STYLES[row.result]), Text(row.detail))
    console.print(table)
    console.print(", ".join(f"{count} {result}" for result, count in report.counts.items()))
    if json_path is not None:
        write_json(json_path, report.to_json())
    if not report.ok:
        raise typer.Exit(1)
