"""What a run looked like: its table, its metrics, its learning curve, its transcripts.

Reads a run's folder and never changes it, but for the curve that is asked for. A figure without an interval
is shown without one; a metric that was not finite is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.console import Group as Lines
from rich.measure import Measurement
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from agentrl.errors import BadData, UnknownName, did_you_mean
from agentrl.log import Display, Phase, Row, RunFolder, read_object, read_rows
from agentrl.transcript import message_from_json, to_ansi

__all__ = [
    "evaluation_table",
    "find_run",
    "metrics_table",
    "plot_curve",
    "show_run",
    "sparkline",
    "summary_table",
]

_BLOCKS = "▁▂▃▄▅▆▇█"
_WIDTH = 32  # characters of a sparkline
_SHOWN = ("task_id", "messages", "reward", "score", "stop_reason", "valid", "fault")  # of a transcript
_REWARD, _HELD_OUT = "reward/mean", "eval/pass@1"  # the curve's metrics; an interval is at _low and _high


def find_run(name: str, *, output: str = "runs") -> RunFolder:
    """The run in the folder ``name``, or of that name below ``output``. Raises UnknownName."""
    for root in (Path(name), Path(output, name)):
        if RunFolder(root).config.is_file():
            return RunFolder(root)
    known = sorted(path.parent.name for path in Path(output).glob("*/config.yaml"))
    hint = did_you_mean(name, known) or f"; there are {', '.join(known) or 'none'} in {output}/"
    raise UnknownName(f"no run {name!r}{hint}. A run is a folder with a config.yaml.")


def show_run(folder: RunFolder, display: Display, *, transcripts: int = 2) -> None:
    """Print the summary, the metrics and the last ``transcripts`` episodes."""
    if folder.summary.is_file():
        text = folder.summary.read_text(encoding="utf-8", errors="replace")
        display.show(summary_table(read_object(text, where=str(folder.summary))))
    rows = read_rows(folder)
    display.show(metrics_table(rows) if rows else "no step is finished yet")
    for episode in _last_episodes(folder, transcripts):
        display.show(_episode(episode))
    if folder.curve.is_file():
        display.note(f"learning curve: {folder.curve}")


def summary_table(summary: Mapping[str, Any]) -> Table:
    """Before, after and gain, a line a measure: ``{"before": {"pass@1": {"value", "low", "high"}}, ...}``."""
    columns = [name for name in ("before", "after", "gain") if isinstance(summary.get(name), Mapping)]
    measures = dict.fromkeys(measure for name in columns for measure in _measures(summary[name]))
    tasks = f" on {summary['tasks']} held-out tasks" if "tasks" in summary else ""
    title = f"pass@k{tasks}, 95 % intervals"  # without edges three intervals fit into 80 columns
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for measure in measures:
        table.add_row(
            measure, *(_with_interval(summary[name].get(measure), name == "gain") for name in columns)
        )
    return table


def evaluation_table(result: Mapping[str, Any], *, title: str) -> RenderableType:
    """One evaluation, a line a measure; ``result`` is what ``Evaluation.to_json`` gives."""
    table = Table(title=title, title_justify="left")
    table.add_column("measure")
    table.add_column("value, 95 % interval", justify="right", no_wrap=True)
    for measure in _measures(result):
        bounds = result.get("bounds", {}).get(measure)
        between = f"between {bounds['worst']:.3f} and {bounds['best']:.3f}" if bounds else "-"
        table.add_row(measure, _with_interval(result[measure], False) if result[measure] else between)
    count = f"{result['tasks']} tasks x {result['samples']} episodes"
    if result["invalid"]:
        count += f", {result['invalid']:.1%} of them invalid (the world failed) and left out"
    return Lines(table, Text(count))


def metrics_table(rows: Sequence[Row]) -> Table:
    """First and last value of each metric and its course over the rows that have it."""
    steps = sum(row["phase"] == "train" for row in rows)
    table = Table(title=f"metrics of {steps} steps", title_justify="left")
    table.add_column("metric", no_wrap=True)
    table.add_column("first", justify="right", no_wrap=True)
    table.add_column("last", justify="right", no_wrap=True)
    table.add_column("course")  # the one that gives way on a narrow terminal
    keys = sorted({key for row in rows for key in row} - {"phase", "step"})
    for key in keys:
        values = [row[key] for row in rows if row.get(key) is not None]
        if values:
            table.add_row(key, f"{values[0]:.4g}", f"{values[-1]:.4g}", _Course(values))
    return table


class _Course:
    """A sparkline as wide as there is room for it."""

    def __init__(self, values: Sequence[float]) -> None:
        self._values = values

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(1, min(_WIDTH, len(self._values)))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(sparkline(self._values, width=min(_WIDTH, options.max_width)))


def sparkline(values: Sequence[float], *, width: int = _WIDTH) -> str:
    """``values`` in order as at most ``width`` blocks, each the mean of its share."""
    count = min(width, len(values))
    edges = [len(values) * index // count for index in range(count + 1)] if count else [0]
    means = [_mean(values[start:stop]) for start, stop in zip(edges, edges[1:], strict=False)]
    low, high = min(means, default=0.0), max(means, default=0.0)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[round((mean - low) * scale)] for mean in means)


def plot_curve(rows: Sequence[Row], path: Path, *, title: str = "") -> None:
    """The learning curve as a PNG: held-out pass@1 with its 95 % intervals over the training reward."""
    from matplotlib.figure import Figure  # without pyplot: no state that other figures share

    figure = Figure(figsize=(7.2, 4.4), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    training = _points(rows, _REWARD, phase="train")
    if training:
        axes.plot(
            *zip(*training, strict=True),
            color="#7fa6d6",
            linewidth=1.4,
            label="training reward, mean of a step",
        )
    held_out = _points(rows, _HELD_OUT, phase="evaluation")
    if held_out:
        steps, values = zip(*held_out, strict=True)
        below, above = (_reach(rows, side) for side in ("low", "high"))
        axes.errorbar(
            steps,
            values,
            yerr=(below, above),
            label="held-out pass@1, 95 % interval",
            color="#c2410c",
            marker="o",
            markersize=5,
            capsize=3,
            linewidth=1.6,
        )
    axes.set(xlabel="step", ylabel="reward, pass@1", title=title)
    everything = [value for _, value in training + held_out]
    if everything and min(everything) >= 0 and max(everything) <= 1:
        axes.set_ylim(-0.02, 1.02)
    axes.grid(visible=True, color="#e3e3e3", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if everything:
        axes.legend(loc="lower right", frameon=False)
    figure.savefig(path)


def _points(rows: Iterable[Row], key: str, *, phase: Phase) -> list[tuple[int, float]]:
    """(step, value) of the rows of ``phase`` that hold a finite ``key``."""
    return [(row["step"], row[key]) for row in rows if row["phase"] == phase and row.get(key) is not None]


def _reach(rows: Iterable[Row], side: str) -> list[float]:
    """How far the interval of each held-out point reaches to one side; 0 where it has none."""
    bounds = dict(_points(rows, f"{_HELD_OUT}_{side}", phase="evaluation"))
    points = _points(rows, _HELD_OUT, phase="evaluation")
    return [abs(bounds.get(step, value) - value) for step, value in points]


def _measures(result: Mapping[str, Any]) -> list[str]:
    """The keys of ``result`` that hold an estimate; pass@k without one had too many invalid episodes."""
    return [
        name
        for name, estimate in result.items()
        if name.startswith("pass@") or (isinstance(estimate, Mapping) and "value" in estimate)
    ]


def _with_interval(estimate: Mapping[str, float | None] | None, signed: bool) -> str:
    if not estimate or estimate.get("value") is None:
        return "-"
    sign = "+" if signed else ""
    bounds = [estimate.get("low"), estimate.get("high")]
    interval = "" if None in bounds else f" [{bounds[0]:{sign}.3f}, {bounds[1]:{sign}.3f}]"
    return f"{estimate['value']:{sign}.3f}{interval}"


def _last_episodes(folder: RunFolder, count: int) -> list[dict[str, Any]]:
    """The newest transcripts, of the last steps that have some."""
    episodes: list[dict[str, Any]] = []
    for path in sorted(folder.trajectories.glob("step_*.jsonl"), reverse=True):
        if len(episodes) >= count:
            break
        step = int(path.stem.removeprefix("step_"))
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
        for number, line in enumerate(lines, start=1):
            if line:
                episodes.append(_read_episode(line, where=f"{path}, line {number}") | {"step": step})
    return episodes[:count]


def _read_episode(line: str, *, where: str) -> dict[str, Any]:
    """A line that ``agentrl.log.transcript`` wrote. Raises BadData."""
    episode = read_object(line, where=where)
    if lacking := [key for key in _SHOWN if key not in episode]:
        raise BadData(f"{where} has no {lacking[0]!r}: it is no transcript; remove the line")
    return episode


def _episode(episode: Mapping[str, Any]) -> RenderableType:
    messages = [message_from_json(message) for message in episode["messages"]]
    worth = f"reward {episode['reward']:g}" if episode["valid"] else f"invalid: {episode['fault']}"
    note = (episode["score"] or {}).get("note", "")
    end = Text(f"{episode['stop_reason']}, {worth}{': ' if note else ''}{note}", style="dim")
    title = Text(f"step {episode['step']}, task {episode['task_id']}")
    return Panel(Lines(Text.from_ansi(to_ansi(messages)), end), title=title, title_align="left")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
