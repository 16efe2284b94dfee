"""The loop: rollouts, advantages, update, publish; once for on-policy and for asynchronous training.

Rollouts may run ahead of the update by ``algorithm.max_staleness`` versions, and then go on while it is made;
0 is strictly on-policy.
Held-out tasks are measured before, every ``evaluation.every`` steps and after. Ctrl-C and SIGTERM let the
step finish, save, and say how to resume; a second one stops at once, as does one before or after the steps,
where nothing would be saved. A run that ended at any instant, killed or not, can be resumed: to the same
numbers where its engine is deterministic and nothing runs ahead.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from agentrl.ahead import Ahead
from agentrl.alarms import Alarms
from agentrl.allocator import cheap_collection
from agentrl.checkpoint import Checkpoints, Saved, State
from agentrl.config import RunConfig, dump_config
from agentrl.configfile import load_config
from agentrl.env import Env
from agentrl.errors import BadConfig, BadData, UserError
from agentrl.evaluation import Evaluation, Measurement, compare
from agentrl.files import write_text, writing
from agentrl.heldout import HeldOut
from agentrl.log import Display, RunFolder, RunLog, forget_evaluations, read_object, read_rows
from agentrl.models import default_device, load_tokenizer
from agentrl.preflight import check_run
from agentrl.prepare import prepare_base
from agentrl.registry import make
from agentrl.resume import Process, accepted_changes, tokenizer_digest
from agentrl.show import plot_curve, summary_table
from agentrl.statistics import Estimate
from agentrl.stop_signal import StopSignal
from agentrl.threads import in_compute_thread, run_sync
from agentrl.trainer import RolledOut, Trainer

__all__ = ["train"]

Summary = dict[str, Any]
# Sections that the measurement of the base depends on: accepted changes in them have it made anew.
_MEASURED = ("environment.", "evaluation.", "model.", "rollout.", "seed")


def train(
    source: str | Path | Mapping[str, Any] | RunConfig,
    *,
    overrides: Sequence[str] = (),
    model: str | None = None,
    resume: bool = False,
    accept: Sequence[str] = (),
) -> Summary:
    """Run a configuration to its end and return its summary; blocks, also under a running event loop.

    ``source`` is a YAML file, a packaged configuration's name, an environment's name or a mapping;
    ``overrides`` are ``key=value``; ``model`` replaces the configured one. ``resume`` goes on behind the
    newest checkpoint; ``accept`` names the keys or sections in which the configuration may differ from the
    one that the run began with. The summary is what ``summary.json`` holds: before, after and gain with 95 %
    intervals; ``{"stopped_at": step, "signal": number}`` where a signal ended the run early. Raises
    UserError, and KeyboardInterrupt for a signal before or after the steps.
    """
    if accept and not resume:
        raise BadConfig(f"accept is {list(accept)} without resume, where nothing is compared: add --resume")
    _check_named(source)
    config = source if isinstance(source, RunConfig) else load_config(source, overrides, model=model)
    check_run(config, device=default_device())
    with StopSignal() as stop:
        try:
            return run_sync(_Run(config, stop, resume=resume, accept=accept).run())
        except KeyboardInterrupt:
            Display().note("interrupted; the same command with --resume goes on from what was saved last")
            raise


def _check_named(source: Any) -> None:
    """Raises UserError for an environment that is no name, by which a resumed run could find it again."""
    section = source.get("environment") if isinstance(source, Mapping) else source
    given = section.get("id") if isinstance(section, Mapping) else section
    if callable(given) or isinstance(given, Env):
        name = getattr(given, "__name__", type(given).__name__)
        raise UserError(
            f"train can't take {given!r}: a run that is resumed finds its environment by a name; write "
            f"'module:{name}', or agentrl.register({name.lower()!r}, {name}) and then {name.lower()!r}"
        )


class _Run:
    """One run of a configuration."""

    def __init__(self, config: RunConfig, stop: StopSignal, *, resume: bool, accept: Sequence[str]) -> None:
        self._config, self._stop, self._resume, self._accept = config, stop, resume, accept
        self._folder = RunFolder(Path(config.output) / config.name)
        self._checkpoints = Checkpoints(self._folder.checkpoints, keep=config.checkpoint.keep)
        self._began = time.perf_counter()
        self._done = 0  # steps
        self._score: float | None = None  # held-out, at the last step; None where it was not measured

    async def run(self) -> Summary:
        """Prepare, evaluate, train, evaluate."""
        saved = self._find_saved() if self._resume else None
        changed = self._changes(saved) if self._resume else []
        if self._resume and self._folder.summary.is_file() and not changed:
            Display().note(f"{self._folder.root} is finished already: see its summary.json")
            return read_object(
                self._folder.summary.read_text(encoding="utf-8"), where=str(self._folder.summary)
            )
        self._process = await self._restored_process(saved)
        if any(key.startswith(_MEASURED) for key in changed):
            forget_evaluations(self._folder)
        with (
            Display() as self._display,
            RunLog(
                self._folder,
                config_text=dump_config(self._config),
                trackers=self._config.log.trackers,
                transcripts=self._config.log.transcripts,
                resume_after=self._resume_after(saved),
            ) as self._log,
        ):
            write_text(self._folder.process, self._process.to_json())
            # The compute thread outlives the run: its setting is the caller's again afterwards.
            threads = await in_compute_thread(self._process.restore_threads)
            try:
                with cheap_collection():
                    return await self._run(saved)
            finally:
                await in_compute_thread(torch.set_num_threads, threads)

    async def _run(self, saved: Saved | None) -> Summary:
        self._alarms = Alarms(read_rows(self._folder))
        await self._load()
        try:
            with self._trainer.apart():
                before = await self._held_out.before()
            if saved:
                await self._restore(saved)
            if not await self._steps():
                return {"stopped_at": self._done, "signal": self._stop.number}
            return await self._finish(before)
        finally:
            await self._trainer.close()

    # -- resuming --

    def _find_saved(self) -> Saved | None:
        """The checkpoint to go on behind."""
        if not self._folder.config.is_file():
            Display().note(f"there is no run in {self._folder.root} to go on with: a new one begins")
        path = self._checkpoints.latest(on_damage=Display().note)
        return self._checkpoints.read(path) if path else None

    def _changes(self, saved: Saved | None) -> list[str]:
        """The accepted keys in which the run's configuration is another now. Raises BadConfig."""
        root, path = self._folder.root, self._folder.config
        if saved is None and not path.is_file():
            return []
        before = saved.state.config if saved else path.read_text(encoding="utf-8")
        changed = accepted_changes(root, before, dump_config(self._config), accept=self._accept)
        if saved and saved.state.step > self._config.steps:
            raise BadConfig(
                f"steps is {self._config.steps}, but {root} has {saved.state.step} of them behind it; it "
                "must be at least that: raise steps, or start a new run with name=..."
            )
        return changed

    async def _restored_process(self, saved: Saved | None) -> Process:
        """This process with the threads of the one that began the run; says what else differs."""
        now = await in_compute_thread(Process.current)
        if saved:
            began = saved.state.process
        elif self._resume and self._folder.process.is_file():
            began = Process.from_json(self._folder.process.read_text(encoding="utf-8"))
        else:
            return now
        if differing := began.differences(now):
            Display().note(f"the run's numbers may differ from here on: {'; '.join(differing)}")
        return Process(began.threads, now.versions)

    def _resume_after(self, saved: Saved | None) -> int | None:
        """The step to go on behind: 0 where only the base is made, None where nothing is.

        Raises BadData for a checkpoint without the base that it belongs to.
        """
        warm = self._folder.warm_start
        is_made = self._config.warm_start is None or warm.is_dir()
        if saved and not is_made:
            raise BadData(
                f"{warm} is missing, the base that {saved.path} belongs to; put it back, or start a new run "
                "with name=..."
            )
        if saved:
            return saved.state.step
        return 0 if self._resume and is_made and self._folder.config.is_file() else None

    async def _restore(self, saved: Saved) -> None:
        state = saved.state
        if state.tokenizer != self._tokenizer and "tokenizer" not in self._accept:
            raise BadConfig(
                f"the tokenizer of {self._base} is not the one that {saved.path} was trained with; restore "
                "the model's folder as it was, or add --accept tokenizer"
            )
        self._checkpoints.forget_after(state.step)
        await self._trainer.restore(saved.adapter, saved.optimizer, version=state.version)
        self._done = state.step

    async def _load(self) -> None:
        """The base model, and the trainer over it."""
        base = await prepare_base(self._config, self._make_env, log=self._log, display=self._display)
        tokenizer = load_tokenizer(base)
        self._base, self._tokenizer = base, tokenizer_digest(tokenizer)
        self._trainer = await Trainer.load(
            self._config, base, tokenizer=tokenizer, make_env=self._make_env, on_note=self._display.note
        )
        self._held_out = HeldOut(
            self._config,
            self._trainer.rollouts,
            make_env=self._make_env,
            log=self._log,
            display=self._display,
        )

    def _make_env(self) -> Env:
        return make(self._config.environment.id, **self._config.environment.args)

    # -- steps --

    async def _steps(self) -> bool:
        """Train to the end; False where a signal ended it early."""
        config, stopped, saved = self._config, False, ""
        steps, most = range(self._done, config.steps), config.algorithm.max_staleness
        with self._stop.held(), self._display.bar("training", total=config.steps) as bar:
            bar.advance(self._done)
            async with Ahead(self._trainer.roll_out, steps, most=most) as rollouts:
                while self._done < config.steps and not stopped:
                    reward = await self._step(rollouts)
                    bar.advance(note=f"reward {reward:.3f}")
                    stopped = self._stop.number is not None
                    if stopped or self._is_saved_at(self._done):
                        saved = f", saved in {await in_compute_thread(self._save)}"
            stopped = self._stop.number is not None
        if stopped:
            self._display.note(
                f"stopped after step {self._done} of {config.steps}{saved}; "
                "go on with the same command and --resume"
            )
        return not stopped

    def _is_saved_at(self, step: int) -> bool:
        if step == self._config.steps or step % self._config.checkpoint.every == 0:
            return True
        best = self._checkpoints.best()
        return self._score is not None and (best is None or self._score > best[1])

    async def _step(self, rollouts: Ahead[RolledOut]) -> float:
        """One step from its rollouts to its row, and a point of the curve where one is due; the mean
        reward."""
        began = time.perf_counter()
        rolled = await rollouts.next()
        row = await self._trainer.learn(self._done, rolled, waited_s=time.perf_counter() - began)
        row["time/step_s"] = time.perf_counter() - began
        self._done += 1
        self._log.step(self._done, row)
        for alarm in self._alarms.watch(self._done, row):
            self._display.note(str(alarm))
        self._log.transcripts(self._done, rolled.groups)
        settings, self._score = self._config.evaluation, None
        if settings.every and self._done % settings.every == 0 and self._done < self._config.steps:
            with self._trainer.apart():
                self._score = await self._held_out.between(self._done)
        return row.get("reward/mean", float("nan"))

    def _save(self) -> Path:
        state = State(
            step=self._done,
            version=self._trainer.version,
            config=dump_config(self._config),
            tokenizer=self._tokenizer,
            process=self._process,
            score=self._score,
        )
        adapter, optimizer = self._trainer.snapshot()
        return self._checkpoints.save(state, adapter=adapter, optimizer=optimizer)

    # -- the end --

    async def _finish(self, before: Measurement) -> Summary:
        """Measure the trained policy; write the summary, the curve and the table."""
        after = await self._held_out.after()
        gain = {f"pass@{k}": _gain(before.sampled, after.sampled, k) for k in before.sampled.k}
        summary = {
            "before": before.figures,
            "after": after.figures,
            "gain": {name: one and dataclasses.asdict(one) for name, one in gain.items()},
            "tasks": len(after.sampled.counts),
            "steps": self._config.steps,
            "seed": self._config.seed,
            "seconds": time.perf_counter() - self._began,
        }
        with writing(self._folder.curve):
            plot_curve(read_rows(self._folder), self._folder.curve, title=self._config.name)
        self._log.summary(summary)  # last: it says that the run is finished
        self._display.show(summary_table(summary))
        self._display.note(f"{summary['seconds']:.0f} s; learning curve: {self._folder.curve}")
        return summary


def _gain(before: Evaluation, after: Evaluation, k: int) -> Estimate | None:
    """The paired gain in pass@k; None where too much of either is invalid for a headline of its own."""
    reports = [each.reports[f"pass@{k}"] for each in (before, after)]
    return compare(before, after, k) if all(report.headline for report in reports) else None
