"""The command line: train, eval, bench, check, list, show, export, sandbox, version.

A UserError is one clear line on stderr and exit code 2; a WorldError (a server that can't be reached, say) or
too many invalid episodes the same and 1, as is a check that fell; Ctrl-C is 130 and SIGTERM 143; a bug keeps
its traceback. What loads torch is imported by the command that needs it, so ``--help`` is quick.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from typer.core import TyperGroup

from agentrl.errors import BadConfig, Diverged, TooManyInvalid, UserError, WorldError, WrongWeights
from agentrl.files import check_output, write_json
from agentrl.sandbox_cli import sandbox_app
from agentrl.stop_signal import Interrupted

if TYPE_CHECKING:
    from agentrl.engine import Sampling
    from agentrl.env import Env
    from agentrl.log import Display

__all__ = ["app", "main"]


class _Group(TyperGroup):
    """Commands that end in one line where the user, the world or the policy's numbers are at fault."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (UserError, TooManyInvalid, WorldError, WrongWeights, Diverged) as error:
            typer.echo(f"{type(error).__name__}: {error}", err=True)
            raise typer.Exit(2 if isinstance(error, UserError) else 1) from None
        except KeyboardInterrupt as error:
            typer.echo("interrupted", err=True)
            number = error.number if isinstance(error, Interrupted) else signal.SIGINT
            raise typer.Exit(128 + number) from None


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Reinforcement learning of tool-using language models: train, evaluate, check.",
)

app.add_typer(sandbox_app, name="sandbox")

Settings = Annotated[
    list[str] | None, typer.Argument(help="Settings as key=value, like rollout.group_size=4.")
]
EnvironmentArgs = Annotated[
    list[str] | None, typer.Argument(help="The environment's arguments as key=value.")
]
EnvironmentName = Annotated[str, typer.Argument(help="A name of 'agentrl list', or 'package.module:Name'.")]
Run = Annotated[str, typer.Argument(help="A run's folder, or its name in runs/.")]


@app.command()
def train(
    target: Annotated[str, typer.Argument(help="A YAML file, a packaged configuration, or an environment.")],
    settings: Settings = None,
    model: Annotated[
        str | None, typer.Option(help="A model's folder or hub id, instead of the one configured.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run from its last checkpoint.")
    ] = False,
    accept: Annotated[
        str, typer.Option(help="With --resume: settings that may differ from the run's, like steps,batch.")
    ] = "",
) -> None:
    """Train a model on an environment."""
    from agentrl.configfile import load_config

    config = load_config(target, settings or (), model=model)  # before torch is loaded: most faults are here
    from agentrl.training import train

    summary = train(config, resume=resume, accept=[key for key in accept.split(",") if key])
    if "signal" in summary:  # saved after its step; by convention 130 for Ctrl-C, 143 for SIGTERM
        raise typer.Exit(128 + summary["signal"])


@app.command("eval")
def evaluate(
    env: EnvironmentName,
    settings: EnvironmentArgs = None,
    *,
    model: Annotated[str, typer.Option(help="The model's folder or hub id.")],
    adapter: Annotated[str | None, typer.Option(help="Folder of a LoRA adapter of that model.")] = None,
    n: Annotated[int | None, typer.Option("-n", min=1, help="Episodes a task; 8, or 1 where greedy.")] = None,
    k: Annotated[str, typer.Option("-k", help="pass@k for each, like 1,8; at most n.")] = "1",
    tasks: Annotated[int, typer.Option(min=1, help="How many tasks.")] = 100,
    split: Annotated[str, typer.Option(help="Of the environment's tasks.")] = "test",
    temperature: Annotated[float | None, typer.Option(min=0, help="Of sampling; 1.")] = None,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling; 1: off.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="The likeliest tokens only; 0: all.")] = 0,
    greedy: Annotated[
        bool, typer.Option("--greedy", help="The likeliest token always, one episode a task.")
    ] = False,
    max_turn_tokens: Annotated[int, typer.Option(min=1, help="Sampled in one turn, at most.")] = 512,
    context: Annotated[int, typer.Option(min=1, help="Tokens of a whole conversation, at most.")] = 2048,
    engine: Annotated[
        list[str] | None,
        typer.Option(help="vllm, or openai with url=...: a key of the section 'engine' each; repeatable."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of tasks and samples.")] = 0,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Also write the report to this file.")
    ] = None,
) -> None:
    """Measure pass@k with 95 % intervals, clustered by task."""
    if greedy and (n is not None or temperature is not None):
        raise BadConfig("-n and --temperature have no effect with --greedy, one episode a task: remove them")
    temperature = 0.0 if greedy else 1.0 if temperature is None else temperature
    n = n or (1 if temperature == 0 else 8)
    counts, sampling = _counts(k), _sampling(max_turn_tokens, temperature, top_p=top_p, top_k=top_k)
    from agentrl.configfile import load_engine

    served_by = load_engine(engine or ())
    weights = served_by.kind != "openai"
    args = _check_evaluation(env, settings, model=model, weights=weights, split=split, json_path=json_path)
    from agentrl.evaluation import evaluate
    from agentrl.log import Display
    from agentrl.show import evaluation_table

    with Display() as display, display.bar("episodes", total=tasks * n) as bar:
        result = evaluate(
            env,
            model=model,
            adapter=adapter,
            n=n,
            k=counts,
            tasks=tasks,
            split=split,
            seed=seed,
            sampling=sampling,
            context=context,
            engine=served_by,
            args=args,
            on_episode=bar.advance,
            on_note=display.note,
        ).to_json()
    display.show(evaluation_table(result, title=f"{env}, {split}"))
    if json_path is not None:
        write_json(json_path, result)
    _say_what_failed(result, display)


@app.command()
def bench(
    target: Annotated[str, typer.Argument(help="A YAML file, a packaged configuration, or an environment.")],
    settings: Settings = None,
    model: Annotated[
        str | None, typer.Option(help="A model's folder or hub id, instead of the one configured.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps to measure, after one that is not.")] = 3,
    profile: Annotated[
        Path | None, typer.Option(help="Write a torch trace of one more step to this file.")
    ] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Also write the report to this file.")
    ] = None,
) -> None:
    """Show where a training step's seconds and bytes go; leaves no run behind."""
    from agentrl.configfile import load_config

    config = load_config(target, settings or (), model=model)
    check_output(profile, key="--profile")
    check_output(json_path, key="--json")
    from agentrl.bench import bench, bench_table
    from agentrl.log import Display

    with Display() as display:
        report = bench(config, steps=steps, profile=profile, display=display)
        for table in bench_table(report):
            display.show(table)
    if json_path is not None:
        write_json(json_path, report.to_json())


@app.command()
def check(env: EnvironmentName, settings: EnvironmentArgs = None) -> None:
    """Check that an environment is sound; exit code 1 if something fell."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from agentrl.checks import check_environment
    from agentrl.configfile import parse_assignments
    from agentrl.preflight import check_splits
    from agentrl.registry import make

    with closing(make(env, **parse_assignments(settings or ()))) as made:
        check_splits(made, cast("Env", made.unwrapped).splits)
        report = check_environment(made)
    table = Table("check", "result", "detail", title=env, title_justify="left")
    for row in report.rows:
        table.add_row(row.name, "passed" if row.passed else "FELL", Text(row.detail))
    Console().print(table)
    if not report.ok:
        raise typer.Exit(1)


@app.command("list")
def list_names() -> None:
    """List the environments, rewards, sandboxes and packaged configurations."""
    from agentrl.configfile import packaged_configs
    from agentrl.registry import list_environments, list_rewards, list_sandboxes

    groups = {
        "environments": list_environments(),
        "rewards": list_rewards(),
        "sandboxes": list_sandboxes(),
        "configs": packaged_configs(),
    }
    for kind, names in groups.items():
        typer.echo(f"{kind}: {', '.join(names)}")


@app.command()
def show(
    run: Run,
    transcripts: Annotated[int, typer.Option(min=0, help="How many of the last episodes.")] = 2,
) -> None:
    """Show a run's results, metrics and last episodes."""
    from agentrl.log import Display
    from agentrl.show import find_run, show_run

    show_run(find_run(run), Display(), transcripts=transcripts)


@app.command()
def export(
    run: Run,
    merge: Annotated[Path, typer.Option(help="Folder for the merged checkpoint.")],
) -> None:
    """Write a run's model as a checkpoint that transformers and vLLM load."""
    from agentrl.export import export
    from agentrl.show import find_run

    step = export(find_run(run).root, merge, on_note=lambda line: typer.echo(line, err=True))
    typer.echo(f"wrote {merge} (step {step})")


@app.command()
def version() -> None:
    """Print the version."""
    from importlib.metadata import version

    typer.echo(version("agentrl-gym"))


def main() -> None:
    """The console script."""
    app(prog_name="agentrl")


def _check_evaluation(
    env: str,
    settings: Sequence[str] | None,
    *,
    model: str,
    weights: bool,  # whether the model's are needed here
    split: str,
    json_path: Path | None,
) -> dict[str, Any]:
    """The environment's arguments, once what can be wrong is known to be right without loading torch."""
    from agentrl.configfile import parse_assignments
    from agentrl.modelfiles import find_model_config, find_model_files
    from agentrl.preflight import check_splits
    from agentrl.registry import make

    args = parse_assignments(settings or ())
    with closing(make(env, **args)) as made:
        check_splits(made, [split])
        cast("Env", made.unwrapped).check_host()
    (find_model_files if weights else find_model_config)(model)
    check_output(json_path, key="--json")
    return args


def _say_what_failed(result: Mapping[str, Any], display: Display) -> None:
    """Note the world's commonest failure. Raises TooManyInvalid where it left no figure to stand by."""
    failure = result.get("failure", "")
    if all(figure is None for name, figure in result.items() if name.startswith("pass@")):
        raise TooManyInvalid(
            f"too many episodes are invalid for a figure: {failure}. Repair that and measure again"
        )
    if failure:
        display.note(f"of the invalid episodes {failure}")


def _sampling(max_tokens: int, temperature: float, *, top_p: float, top_k: int) -> Sampling:
    from agentrl.engine import Sampling

    if temperature == 0 and (top_p != 1 or top_k != 0):
        raise BadConfig("--top-p and --top-k have no effect on the likeliest token alone: remove them")
    try:
        return Sampling(max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=0)
    except ValueError as error:
        raise BadConfig(str(error)) from None


def _counts(text: str) -> tuple[int, ...]:
    """ "1,8" as (1, 8)."""
    if not all(part.strip().isdecimal() for part in text.split(",")):
        raise BadConfig(f"-k is {text!r}; it must be counts like 1,8")
    return tuple(int(part) for part in text.split(","))
