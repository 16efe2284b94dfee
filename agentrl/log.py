"""What a run leaves behind while it runs: its folder, its rows, its transcripts, its bars on a terminal.

    runs/NAME/  config.yaml        the resolved configuration
                process.json       threads and versions of the process that began it
                metrics.jsonl      one row a step of a phase: "phase", "step", metrics called "stage/quantity"
                trajectories/      step_000012.jsonl, one transcript a line
                summary.json       written when the run ends, at once or not at all
                curve.png          the learning curve
                base/, warm_start/ the model that was made for the run, before and after the warm start
                before.json        the evaluation of that model, task by task
                after.json         the same of the trained policy, to compare two runs
                checkpoints/       see agentrl.checkpoint
                tensorboard/       events; other trackers keep theirs where they want

Rows are flushed as they are written and never change, but for the cut that a resumed run makes. A value that
is not finite is written as null.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, Self

import yaml
from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from agentrl.errors import BadConfig, BadData, MissingExtra, did_you_mean
from agentrl.files import remove_folder, write_text, writing
from agentrl.transcript import message_to_json
from agentrl.types import Group, Trajectory

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

__all__ = [
    "Bar",
    "Display",
    "Phase",
    "Row",
    "RunFolder",
    "RunLog",
    "forget_evaluations",
    "read_object",
    "read_rows",
    "transcript",
    "truncate_after",
]

Phase = Literal["warm_start", "train", "evaluation"]
Row = dict[str, Any]  # "phase", "step", and a float or None by metric


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Where a run keeps what."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def process(self) -> Path:
        return self.root / "process.json"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def trajectories(self) -> Path:
        return self.root / "trajectories"

    @property
    def base(self) -> Path:
        return self.root / "base"

    @property
    def warm_start(self) -> Path:
        return self.root / "warm_start"

    @property
    def before(self) -> Path:
        return self.root / "before.json"

    @property
    def after(self) -> Path:
        return self.root / "after.json"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def summary(self) -> Path:
        return self.root / "summary.json"

    @property
    def curve(self) -> Path:
        return self.root / "curve.png"

    def transcripts(self, step: int) -> Path:
        """The transcripts of one step, one JSON object a line."""
        return self.trajectories / f"step_{step:06d}.jsonl"


class Bar:
    """One progress bar of a :class:`Display`."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task

    def advance(self, amount: int = 1, *, note: str = "") -> None:
        """``amount`` more are done; ``note`` stands beside the bar until the next one."""
        if note:
            self._progress.update(self._task, note=note)
        self._progress.advance(self._task, amount)


class Display:
    """Bars with the time left on a terminal; elsewhere only notes and tables, each once."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=self._console,
            disable=not self._console.is_terminal,
            transient=True,
        )

    def __enter__(self) -> Self:
        if not self._console.is_terminal:  # theirs would be written to a log line by line
            from transformers.utils.logging import disable_progress_bar

            disable_progress_bar()
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def note(self, text: str) -> None:
        """One line that stays: a milestone, not a step."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def show(self, renderable: RenderableType) -> None:
        """A table or another thing of rich's."""
        self._console.print(renderable)

    @contextmanager
    def bar(self, description: str, *, total: int) -> Iterator[Bar]:
        """A bar of ``total`` parts that goes when the block ends."""
        task = self._progress.add_task(description, total=total, note="")
        try:
            yield Bar(self._progress, task)
        finally:
            self._progress.remove_task(task)


class RunLog:
    """Writes a run's folder and feeds its trackers; open in a ``with`` block, in the main process only."""

    def __init__(
        self,
        folder: RunFolder,
        *,
        config_text: str,  # the resolved configuration, YAML
        trackers: Sequence[str] = (),  # accelerate's, by name
        transcripts: int = 2,  # episodes written a step
        resume_after: int | None = None,  # step of the checkpoint that is continued; None: a new run
    ) -> None:
        """Raises BadConfig for an unknown tracker, MissingExtra for one whose package is not installed."""
        self.folder = folder
        self._config_text = config_text
        self._trackers = _make_trackers(trackers, folder)
        self._transcripts = transcripts
        self._resume_after = resume_after
        self._closing = ExitStack()
        self._rows: BinaryIO | None = None
        self._last: dict[Phase, int] = {}

    def __enter__(self) -> Self:
        """Raises BadConfig where the folder holds another run, CannotWrite where it can't be written."""
        with writing(self.folder.root), ExitStack() as opened:
            if self._resume_after is None:
                _begin_anew(self.folder)
            self.folder.trajectories.mkdir(parents=True, exist_ok=True)
            if self._resume_after is not None:
                truncate_after(self.folder, self._resume_after)
                self._last = {row["phase"]: row["step"] for row in read_rows(self.folder)}
            write_text(self.folder.config, self._config_text)
            # Unbuffered: a row that a full disk refuses must not be tried again when the file is closed.
            self._rows = opened.enter_context(self.folder.metrics.open("ab", buffering=0))
            for tracker in self._trackers:
                tracker.start()
                opened.callback(tracker.finish)
                if self._resume_after is None:
                    tracker.store_init_configuration(_flat(yaml.safe_load(self._config_text)))
            self._closing = opened.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()
        self._rows = None

    def step(self, step: int, metrics: Mapping[str, float], *, phase: Phase = "train") -> None:
        """Write the row of one step and hand it to the trackers, where training follows on the warm start.

        Steps rise within a phase.
        """
        if self._rows is None:
            raise RuntimeError("the log is not open: use it in a with block")
        if step <= self._last.get(phase, -1):
            raise ValueError(f"step {step} of {phase} comes after {self._last[phase]}; a row is written once")
        self._last[phase] = step
        values = {key: float(value) for key, value in metrics.items()}
        row: Row = {"phase": phase, "step": step, **{key: _finite(value) for key, value in values.items()}}
        with writing(self.folder.metrics):
            _write_all(self._rows, (json.dumps(row) + "\n").encode())
        # One axis for all: some trackers take no step below the last one.
        before = 0 if phase == "warm_start" else self._last.get("warm_start", 0)
        for tracker in self._trackers:
            tracker.log(values, step=before + step)

    def has(self, step: int, *, phase: Phase) -> bool:
        """Whether the row of ``step`` was written before; a resumed run asks, since a kill may have come
        between a row and what follows it."""
        return self._last.get(phase, -1) >= step

    def transcripts(self, step: int, groups: Sequence[Group]) -> None:
        """Write the first episode of the first groups, as many as are asked for."""
        chosen = [group.trajectories[0] for group in groups if group.trajectories][: self._transcripts]
        if chosen:
            lines = (json.dumps(transcript(trajectory), ensure_ascii=False) for trajectory in chosen)
            path = self.folder.transcripts(step)
            text = "".join(f"{line}\n" for line in lines)
            # A lone surrogate, which a policy's program or a tool may have said, becomes "?".
            write_text(path, text.encode(errors="replace").decode())

    def summary(self, values: Mapping[str, Any]) -> None:
        """Write summary.json, whole or not at all."""
        write_text(self.folder.summary, json.dumps(values, indent=2) + "\n")


def read_rows(folder: RunFolder) -> list[Row]:
    """The rows of metrics.jsonl in order; a last line that was cut off by a kill is left out.

    Raises BadData for a line that is no JSON object.
    """
    if not folder.metrics.is_file():
        return []
    lines = folder.metrics.read_text(encoding="utf-8").split("\n")[:-1]
    return [read_object(line, where=f"{folder.metrics}, line {n}") for n, line in enumerate(lines, 1)]


def read_object(text: str, *, where: str) -> Row:
    """The JSON object that ``text`` is. Raises BadData, which names its place ``where``."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise BadData(f"{where} is not JSON: {error}; it must be one JSON object") from None
    if not isinstance(value, dict):
        raise BadData(f"{where} holds {value!r}; it must be one JSON object")
    return value


def truncate_after(folder: RunFolder, step: int) -> None:
    """Forget the training steps after ``step``: their rows, their transcripts, the summary."""
    kept = [row for row in read_rows(folder) if row["phase"] == "warm_start" or row["step"] <= step]
    write_text(folder.metrics, "".join(json.dumps(row) + "\n" for row in kept))
    for path in folder.trajectories.glob("step_*.jsonl"):
        if int(path.stem.removeprefix("step_")) > step:
            path.unlink()
    folder.summary.unlink(missing_ok=True)


def forget_evaluations(folder: RunFolder) -> None:
    """Forget what was measured on held-out tasks, which was with other settings."""
    kept = [row for row in read_rows(folder) if row["phase"] != "evaluation"]
    write_text(folder.metrics, "".join(json.dumps(row) + "\n" for row in kept))
    folder.before.unlink(missing_ok=True)


def transcript(trajectory: Trajectory) -> dict[str, Any]:
    """An episode as plain JSON: what was said and what it was worth, with token counts instead of tokens."""
    score = trajectory.score
    turns = (
        {"new_tokens": len(turn.new_ids), "sampled_tokens": len(turn.completion.token_ids)}
        | {"finish": turn.completion.finish, "reward": turn.reward, "extends": turn.extends}
        for turn in trajectory.turns
    )
    return {
        "task_id": trajectory.task_id,
        "sibling": trajectory.sibling,
        "seed": trajectory.seed,
        "reward": trajectory.reward,
        "score": score and {"value": score.value, "parts": dict(score.parts), "note": score.note},
        "stop_reason": trajectory.stop_reason,
        "valid": trajectory.valid,
        "fault": trajectory.fault,
        "timings": dict(trajectory.timings),
        "turns": list(turns),
        "messages": [message_to_json(message) for message in trajectory.messages],
    }


def _make_trackers(names: Sequence[str], folder: RunFolder) -> list[GeneralTracker]:
    """Accelerate's trackers, not started yet."""
    if not names:
        return []
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    available = {str(kind) for kind in get_available_trackers()}
    made = []
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            hint = did_you_mean(name, LOGGER_TYPE_TO_CLASS)
            raise BadConfig(f"no tracker named {name!r}{hint}; allowed are {', '.join(LOGGER_TYPE_TO_CLASS)}")
        if name not in available:
            raise MissingExtra(f'tracker {name!r} needs its package: pip install "{name}"')
        kind = LOGGER_TYPE_TO_CLASS[name]
        if kind.requires_logging_directory:  # such a tracker writes to logging_dir/run_name
            made.append(kind(run_name=name, logging_dir=str(folder.root)))
        else:
            made.append(kind(run_name=folder.root.name))
    return made


def _begin_anew(folder: RunFolder) -> None:
    """Clear what a run left that was stopped before its first step; refuse the folder of any other run."""
    root = folder.root
    begun = any(row["phase"] == "train" for row in read_rows(folder)) or any(folder.checkpoints.glob("*"))
    if begun or folder.summary.exists():
        way = f"continue it with --resume, choose another name (name={root.name}-2), or delete it"
        raise BadConfig(f"{root} holds a run: {way}")
    # By name: the folder may hold files of the user's. But a base of another seed must not be taken for ours.
    for leftover in (folder.trajectories, folder.base, folder.warm_start):
        remove_folder(leftover)
    for leftover in (folder.metrics, folder.before, folder.process):
        leftover.unlink(missing_ok=True)


def _write_all(file: BinaryIO, data: bytes) -> None:
    while data:  # an unbuffered file may take a part
        data = data[file.write(data) :]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str | int | float | bool]:
    """Nested settings under dotted keys, as trackers want them."""
    flat: dict[str, str | int | float | bool] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, str | int | float) else json.dumps(value)
    return flat
