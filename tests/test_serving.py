"""Runs and evaluations over HTTP, end to end: a server that speaks vLLM's API over a real, tiny model."""

from __future__ import annotations

import asyncio
import json
import random
import re
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from itertools import count, groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import agentrl
from agentrl.checkpoint import read_adapter
from agentrl.cli import app
from agentrl.config import EngineConfig
from agentrl.engine import Sampling
from agentrl.engines.embedded import EmbeddedEngine
from agentrl.env import Env
from agentrl.errors import EngineError
from agentrl.log import Row, RunFolder, read_rows
from agentrl.models import load_model, load_tokenizer
from agentrl.samples import to_samples
from agentrl.types import Trajectory

STEPS = 4
LIMITS = {"max_turn_tokens": 48, "max_episode_tokens": 160}
Answer = tuple[int, Any, dict[str, str]]
Befalls = Callable[[str, dict[str, Any]], str]  # (path, body): what befalls a request; "": nothing


class ModelServer:
    """What `vllm serve` answers, from ``model`` and the adapters that it is told to load.

    ``befalls`` says what goes wrong with a request: a status, "hang", "drop" (the connection before the
    request is done), "lose" (it afterwards), or "restart", which forgets all adapters and hangs up on all.
    """

    def __init__(self, checkpoint: Path, *, befalls: Befalls = lambda path, body: "") -> None:
        self.base, self._befalls = str(checkpoint), befalls
        self._model, self._tokenizer = load_model(checkpoint), load_tokenizer(checkpoint)
        self._engines = {self.base: EmbeddedEngine(self._model)}  # by the name of base or adapter
        self._loading = asyncio.Lock()
        self._chores: set[asyncio.Task[None]] = set()
        self.http: Any = None  # the LoopbackServer that asks us
        self.befallen: Counter[str] = Counter()
        self.models: list[str] = []  # that completions were asked of, in their order
        self.weights: dict[str, bytes] = {}  # the files of every adapter that was ever loaded
        self.loads: Counter[str] = Counter()  # of an adapter
        self.most_adapters = 0  # at once
        self.said: set[tuple[bytes, ...]] = set()  # prompt, ids and logprobs of every reply

    @property
    def adapters(self) -> list[str]:
        """The adapters that are loaded."""
        return [name for name in self._engines if name != self.base]

    async def close(self) -> None:
        """Release the model."""
        await asyncio.gather(*self._chores)
        for engine in self._engines.values():
            await engine.close()

    async def answer(self, path: str, body: dict[str, Any]) -> Answer:
        """The answer of a request, unless something befalls it."""
        fate = self._befalls(path, body)
        self.befallen[fate] += 1
        if fate == "hang":
            await asyncio.Event().wait()
        if fate == "restart":
            self._chores.add(asyncio.ensure_future(self._restart()))
        if fate in ("drop", "restart"):
            raise ConnectionResetError
        if fate not in ("", "lose"):
            return refusal(int(fate), "the server is busy", {"Retry-After": "0.05"} if fate == "429" else {})
        work = {"/v1/completions": self._complete, "/v1/load_lora_adapter": self._load}
        answer = await work.get(path, self._unload)(body)
        if fate == "lose":
            raise ConnectionResetError
        return answer

    async def _restart(self) -> None:
        forgotten = [self._engines.pop(name) for name in self.adapters]
        await self.http.hang_up()
        for engine in forgotten:
            await engine.close()

    async def _complete(self, body: dict[str, Any]) -> Answer:
        engine = self._engines.get(body["model"])
        if engine is None:
            return refusal(404, f"The model `{body['model']}` does not exist.")
        self.models.append(body["model"])
        prompt = np.array(body["prompt"], np.int32)
        sampling = Sampling(
            max_tokens=body["max_tokens"],
            seed=body["seed"] % (1 << 64),
            temperature=body["temperature"],
            top_p=body["top_p"],
            top_k=body["top_k"],
            stop_token_ids=tuple(body["stop_token_ids"]),
        )
        assert body["ignore_eos"]
        try:
            said = await engine.generate(prompt, sampling)
        except EngineError as error:  # the adapter was forgotten meanwhile
            return refusal(500, str(error))
        ids = said.token_ids.tolist()
        self.said.add((prompt.tobytes(), said.token_ids.tobytes(), said.logprobs.tobytes()))
        choice: dict[str, Any] = {"index": 0, "text": self._tokenizer.decode(ids)}
        choice |= {"finish_reason": said.finish, "token_ids": ids, "prompt_token_ids": body["prompt"]}
        if "logprobs" in body:
            choice["logprobs"] = {"token_logprobs": said.logprobs.tolist()}
        if "prompt_logprobs" in body:
            scored = (await engine.score(prompt, 1.0)).tolist()
            rows = [{str(one): {"logprob": logprob}} for one, logprob in zip(prompt, scored, strict=True)]
            choice["prompt_logprobs"] = [None, *rows[1:]]
        return 200, {"choices": [choice], "usage": {"prompt_tokens": len(prompt)}}, {}

    async def _load(self, body: dict[str, Any]) -> Answer:
        name, folder = body["lora_name"], Path(body["lora_path"])
        async with self._loading:
            if name in self._engines:
                return refusal(400, f"The lora adapter '{name}' has already been loaded.")
            engine = EmbeddedEngine(self._model)
            await engine.load(read_adapter(folder), 0)
            self._engines[name] = engine
        self.weights[name] = (folder / "adapter_model.safetensors").read_bytes()
        self.loads[name] += 1
        self.most_adapters = max(self.most_adapters, len(self.adapters))
        return 200, f"Success: LoRA adapter '{name}' added successfully.", {}

    async def _unload(self, body: dict[str, Any]) -> Answer:
        name = body["lora_name"]
        if name not in self.adapters:
            return refusal(404, f"The lora adapter '{name}' cannot be found.")
        await self._engines.pop(name).close()
        return 200, f"Success: LoRA adapter '{name}' removed successfully.", {}


def refusal(status: int, message: str, headers: dict[str, str] | None = None) -> Answer:
    return status, {"error": {"message": message, "code": status}}, headers or {}


@pytest.fixture(scope="module")
def serve(loopback_server: Any, base: Path) -> Iterator[Callable[..., ModelServer]]:
    """A server of ``base``, in a thread of its own: ``serve(befalls=...)``."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    served: list[ModelServer] = []

    def there(work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, loop).result(60)

    def begin(**befalls: Befalls) -> ModelServer:
        server = ModelServer(base, **befalls)
        server.http = loopback_server(server.answer)
        there(server.http.__aenter__())
        served.append(server)
        return server

    yield begin
    for server in served:
        there(server.http.__aexit__())
        there(server.close())
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


# -- a model that has conversations, and runs over a server of it --


def environment(sums: type[Env]) -> str:
    return f"{sums.__module__}:{sums.__name__}"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, sums: type[Env]) -> Path:
    """The tiny model once it has seen right episodes: it calls the tool, and answers rightly at times."""
    output = tmp_path_factory.mktemp("base")
    agentrl.train(
        {
            "steps": 0,
            "output": str(output),
            "environment": {"id": environment(sums)},
            "model": {"path": str(tiny_checkpoint)},
            "warm_start": {"episodes": 12, "episodes_per_step": 12, "steps": 100, "learning_rate": 2e-2},
            "rollout": LIMITS,
            "evaluation": {"tasks": 1, "samples": 1},
            "log": {"trackers": []},
        }
    )
    return output / "run" / "warm_start"


@dataclass(frozen=True)
class Run:
    """A run of ``STEPS`` steps over a server, and what it left."""

    server: ModelServer
    folder: Path
    adapter_dir: Path
    trained: list[Trajectory]  # whose samples went into an update

    @property
    def rows(self) -> list[Row]:
        """The training steps'."""
        return [row for row in read_rows(RunFolder(self.folder)) if row["phase"] == "train"]


def run_over(
    server: ModelServer, output: Path, *, sums: type[Env], deadline_s: float = 600.0, **engine: Any
) -> Run:
    adapter_dir = output / "adapters"
    settings = {"kind": "openai", "url": server.http.url, "adapter_dir": str(adapter_dir), "backoff_s": 0.01}
    patience = {"request_deadline_s": deadline_s, "retries": 2, "max_invalid": 0.5}
    trained: list[Trajectory] = []

    def remember(trajectory: Trajectory) -> Any:
        trained.append(trajectory)
        return to_samples(trajectory)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("agentrl.trainer.to_samples", remember)
        agentrl.train(
            {
                "steps": STEPS,
                "output": str(output),
                "environment": {"id": environment(sums)},
                "model": {"path": server.base},
                "rollout": {"tasks_per_step": 3, "group_size": 4, **LIMITS, **patience},
                "lora": {"r": 2},
                "optimizer": {"learning_rate": 1e-3},
                "algorithm": {"kl": 0.01},  # so that every step has an update, whatever the rewards
                "engine": settings | engine,
                "evaluation": {"tasks": 3, "samples": 1},
                "log": {"trackers": []},
            }
        )
    return Run(server, output / "run", adapter_dir, trained)


@pytest.fixture(scope="module")
def fair(serve: Callable[..., ModelServer], sums: type[Env], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run over a server that never fails."""
    return run_over(serve(), tmp_path_factory.mktemp("fair"), sums=sums)


def check_was_said(run: Run) -> None:
    """Every turn that was trained on is one that the server said as a whole, id for id, in an episode that
    came to its end."""
    assert run.trained
    for trajectory in run.trained:
        assert trajectory.valid
        assert trajectory.score is not None
        assert trajectory.stop_reason in ("answered", "length", "context", "max_turns")
        for number, turn in enumerate(trajectory.turns):
            completion = turn.completion
            texts = trajectory.prompt_ids(number), completion.token_ids, completion.logprobs
            assert tuple(text.tobytes() for text in texts) in run.server.said


def versions(names: list[str], *, base: str) -> list[str]:
    """The version of each model in ``names``, one of a sequence of equal ones."""
    of_each = ("base" if name == base else name.rpartition("-")[2] for name in names)
    return [version for version, _ in groupby(of_each)]


def test_a_run_over_a_server_samples_each_step_with_what_was_learnt_last(fair: Run) -> None:
    assert versions(fair.server.models, base=fair.server.base) == ["base", "v1", "v2", "v3", "v4"]
    sampled = [{int(v) for turn in one.turns for v in turn.completion.versions} for one in fair.trained]
    assert sampled == [{step} for step in range(STEPS) for _ in range(12)]
    (last,) = (name for name in fair.server.weights if name.endswith("v4"))
    saved = fair.folder / "checkpoints" / "step_000004" / "adapter_model.safetensors"
    assert fair.server.weights[last] == saved.read_bytes()


def test_the_server_and_the_learner_agree_up_to_rounding_on_whole_conversations(fair: Run) -> None:
    assert all(row["mismatch/mean"] < 1e-5 for row in fair.rows)
    assert all(row["mismatch/max"] < 1e-3 for row in fair.rows)
    assert max(row["episode/turns"] for row in fair.rows) > 1.5
    assert max(row["group/informative"] for row in fair.rows) > 0
    check_was_said(fair)


def test_a_run_leaves_no_adapter_at_the_server_and_none_on_disk(fair: Run) -> None:
    assert fair.server.most_adapters == 2  # the new one is there before the old one goes
    assert set(fair.server.loads.values()) == {1}
    assert (fair.server.adapters, list(fair.adapter_dir.iterdir())) == ([], [])


# -- a server that fails --


def is_of_a_step(body: dict[str, Any], tokenizer: Any) -> bool:
    """Whether a request samples a turn of a task that is trained on: 1 + 2 to 12 + 2."""
    found = re.search(r"(\d+) \+ 2\?", tokenizer.decode(body.get("prompt", ())))
    return found is not None and int(found[1]) <= 12 and bool(body["stop_token_ids"])


def test_what_exhausts_its_retries_is_counted_and_costs_its_episode_alone(
    serve: Callable[..., ModelServer], base: Path, sums: type[Env], tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(base)
    asked: Counter[int] = Counter()  # by the seeds of training, each of one turn of one episode

    def befalls(path: str, body: dict[str, Any]) -> str:
        if not is_of_a_step(body, tokenizer):
            return ""
        seed = body["seed"]
        asked[seed] += 1
        never, late = [*asked][0], [*asked][1:2]
        return "500" if seed == never or ([seed] == late and asked[seed] <= 2) else ""

    server = serve(befalls=befalls)
    run = run_over(server, tmp_path, sums=sums, request_retries=1)
    first, *others = run.rows
    # One episode fails in each of three attempts, of two requests each; another one in its first attempt.
    assert (first["fault/engine"], first["fault/retried"]) == (3 + 1, 2 + 1)
    assert first["episode/valid"] == pytest.approx(11 / 12)
    assert all((row["fault/engine"], row["episode/valid"]) == (0, 1) for row in others)
    assert server.befallen["500"] == 3 * 2 + 2
    assert len(run.trained) == STEPS * 12 - 1
    check_was_said(run)


@pytest.mark.parametrize("hangs", [0.0, pytest.param(0.05, marks=pytest.mark.slow)])
def test_a_run_outlasts_a_server_that_fails_at_random_and_is_restarted(
    hangs: float, serve: Callable[..., ModelServer], base: Path, sums: type[Env], tmp_path: Path
) -> None:
    generator, number, tokenizer = random.Random(3), count(1), load_tokenizer(base)

    def befalls(path: str, body: dict[str, Any]) -> str:
        if next(number) % 60 == 0:
            return "restart"
        shares = {"500": 0.05, "429": 0.05, "drop": 0.05, "lose": 0.05}
        if is_of_a_step(body, tokenizer):
            shares["hang"] = hangs
        (fate,) = generator.choices(["", *shares], [1 - sum(shares.values()), *shares.values()])
        return fate

    server = serve(befalls=befalls)
    deadline_s = 3.0 if hangs else 600.0
    run = run_over(server, tmp_path, sums=sums, request_retries=8, deadline_s=deadline_s)
    assert len(run.rows) == STEPS
    assert all(row["mismatch/mean"] < 1e-5 for row in run.rows)
    assert all(server.befallen[fate] for fate in ("500", "429", "drop", "lose", "restart"))
    assert max(server.loads.values()) > 1  # what a restarted server had forgotten
    given_up = server.http.disconnects  # a request that hangs when the server is restarted is not
    assert bool(given_up) == bool(hangs)
    assert sum(row["fault/engine"] for row in run.rows) >= given_up
    assert len(run.trained) == round(sum(12 * row["episode/valid"] for row in run.rows))
    check_was_said(run)
    assert (server.adapters, list(run.adapter_dir.iterdir())) == ([], [])


# -- evaluation --


def test_a_greedy_evaluation_over_a_server_is_the_embedded_engines(
    serve: Callable[..., ModelServer], base: Path, sums: type[Env], tmp_path: Path
) -> None:
    url = serve().http.url
    reports = []
    for name, engine in (("here", ()), ("there", ("--engine", "openai", "--engine", f"url={url}"))):
        report = tmp_path / f"{name}.json"
        command = ["eval", environment(sums), "--model", str(base), "--greedy", "--split", "train"]
        limits = ["--max-turn-tokens", "48", "--context", "160", "--json", str(report)]
        result = CliRunner().invoke(app, [*command, *limits, *engine])
        assert result.exit_code == 0, result.output
        reports.append(json.loads(report.read_text()))
    assert reports[0] == reports[1]
    assert reports[0]["pass@1"]["value"] > 0


def test_the_weights_of_a_served_model_need_not_be_here(
    fair: Run, serve: Callable[..., ModelServer], base: Path, sums: type[Env], tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(base, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    settings: dict[str, Any] = {"n": 1, "tasks": 12, "split": "train", "context": 160}
    settings |= {"sampling": Sampling(max_tokens=48, temperature=0.0, seed=0)}
    server, adapters = serve(), str(tmp_path / "adapters")
    engine = EngineConfig(kind="openai", url=server.http.url, model=str(base), adapter_dir=adapters)
    for adapter in (None, fair.folder / "checkpoints" / "step_000004"):
        here = agentrl.evaluate(sums, model=base, adapter=adapter, **settings)
        there = agentrl.evaluate(sums, model=bare, adapter=adapter, engine=engine, **settings)
        assert there == here
    assert len(set(server.models)) == 2
    assert server.adapters == []
