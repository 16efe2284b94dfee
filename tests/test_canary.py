"""Real models, optimizer steps and engines; what lies is a thin layer over an engine that does not."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from agentrl.canary import Canary, Place, locate
from agentrl.config import AlgorithmConfig, BatchConfig, LoraConfig, OptimizerConfig
from agentrl.engine import Adapter, Sampling
from agentrl.engines.embedded import EmbeddedEngine
from agentrl.errors import EngineError, UserError, WrongWeights
from agentrl.learner import Learner
from agentrl.merging import Merging
from agentrl.types import Completion, FloatArray, IntArray, Sample

pytestmark = pytest.mark.usefixtures("one_thread")

Loads = list[Adapter | None]  # what an engine was given, the bare base first
Choice = Callable[[Loads], Adapter | None]
Noise = Callable[[int], Any]  # nats for so many tokens

VOCABULARY = 300


# -- engines that lie --


def right(loads: Loads) -> Adapter | None:
    return loads[-1]


def stale(loads: Loads) -> Adapter | None:
    return loads[-2]


def bare(loads: Loads) -> Adapter | None:
    return None


def far_off(loads: Loads) -> Adapter | None:
    return shaken(loads[-1], by=1.0)


def shaken(adapter: Adapter | None, *, by: float) -> Adapter:
    """Every value moved by a seeded amount."""
    assert adapter is not None
    generator = torch.Generator().manual_seed(5)
    moved = {
        name: tensor + by * torch.randn(tensor.shape, generator=generator)
        for name, tensor in sorted(adapter.tensors.items())
    }
    return Adapter(adapter.config, moved)


def rounded(loads: Loads) -> Adapter | None:
    """As vLLM holds the adapters of a model in bfloat16."""
    adapter = loads[-1]
    assert adapter is not None
    return Adapter(adapter.config, {name: tensor.bfloat16() for name, tensor in adapter.tensors.items()})


def exact(count: int) -> Any:
    return np.zeros(count)


class Liar:
    """Serves what ``cold`` and, to a conversation that goes on, ``warm`` makes of what it was given."""

    def __init__(
        self,
        model: Any,
        *,
        cold: Choice = right,
        warm: Choice | None = None,
        noise: Noise = exact,
        late: int = 0,  # by how many versions it is late in what it reports
        scores: bool = True,
    ) -> None:
        self._engines = EmbeddedEngine(model), EmbeddedEngine(model)
        self.serve(cold, warm=warm)
        self._noise, self._late, self.scores = noise, late, scores
        self._asked: set[bytes] = set()
        self.loads: Loads = [None]
        self.refused = 0
        self.requests: list[tuple[IntArray, Sampling]] = []

    def serve(self, cold: Choice, *, warm: Choice | None = None) -> None:
        """Choose otherwise from now on."""
        self._choices = cold, warm or cold

    async def generate(self, prompt_ids: IntArray, sampling: Sampling) -> Completion:
        goes_on = any(prompt_ids.tobytes().startswith(past) for past in self._asked)
        self.requests.append((prompt_ids, sampling))
        said = await self._engines[goes_on].generate(prompt_ids, sampling)
        self._asked.add(prompt_ids.tobytes() + said.token_ids.tobytes())
        noisy = said.logprobs + self._noise(len(said.logprobs))
        return Completion(said.token_ids, noisy, said.versions - self._late, said.finish)

    async def score(self, token_ids: IntArray, temperature: float) -> FloatArray:
        if not self.scores:
            self.refused += 1
            raise UserError("this engine does not score")
        scored = await self._engines[0].score(token_ids, temperature)
        noisy: FloatArray = scored + self._noise(len(scored)).astype(np.float32)
        return noisy

    async def load(self, adapter: Adapter | None, version: int) -> None:
        self.loads.append(adapter)
        for engine, choose in zip(self._engines, self._choices, strict=True):
            await engine.load(choose(self.loads), version)

    async def close(self) -> None:
        for engine in self._engines:
            await engine.close()


class StalePrefixes(Liar):
    """Takes every version, and keeps the keys of prompts that it computed under the one before."""

    async def load(self, adapter: Adapter | None, version: int) -> None:
        engine = self._engines[0]
        once = Sampling(max_tokens=1, seed=0)
        await asyncio.gather(*(engine.generate(prompt[:-1], once) for prompt in prompts()))
        batch = engine._batch
        drop, batch._drop = batch._drop, lambda: None  # type: ignore[method-assign]
        try:
            await super().load(adapter, version)
        finally:
            batch._drop = drop  # type: ignore[method-assign]


class Merges(Liar):
    """Has every version in its weights."""

    def __init__(self, model: Any, **lies: Any) -> None:
        self._merging = Merging(dict(model.named_parameters()))
        served = copy.deepcopy(model)
        self._weights = dict(served.named_parameters())
        super().__init__(served, **lies)

    async def load(self, adapter: Adapter | None, version: int) -> None:
        self.loads.append(adapter)
        chosen = self._choices[0](self.loads)
        changes = {} if chosen is None else self._merging.changes(chosen)
        for name, weight in self._weights.items():
            weight.data.copy_(self._merging.make(name, changes.get(name), dtype=weight.dtype))
        for engine in self._engines:
            await engine.load(None, version)


# -- a run in small --


def prompts(count: int = 8) -> list[IntArray]:
    random = np.random.default_rng(3)
    return [random.integers(0, VOCABULARY, 24 + 3 * place, dtype=np.int32) for place in range(count)]


def to_learn(seed: int) -> list[Sample]:
    """Random tokens, half of them to be said more often and half less."""
    random = np.random.default_rng([7, seed])
    mask = np.arange(20) > 5
    return [
        Sample(
            task_id=str(place),
            sibling=0,
            token_ids=random.integers(0, VOCABULARY, 20),
            mask=mask,
            logprobs=np.zeros(20),
            rewards=np.zeros(20),
            versions=np.where(mask, 0, -1),
            advantages=np.where(mask, (-1.0) ** place, 0.0),
        )
        for place in range(6)
    ]


class Run:
    """Optimizer steps, each followed by a swap and its proof."""

    def __init__(self, model: Any, engine: Liar, *, learning_rate: float, **settings: Any) -> None:
        self.engine = engine
        self.learner = Learner(
            model,
            lora=LoraConfig(r=4),
            algorithm=AlgorithmConfig(),
            optimizer=OptimizerConfig(learning_rate=learning_rate, schedule="constant"),
            batch=BatchConfig(tokens_per_microbatch=512),
            steps=100,
            seed=0,
        )
        self.canary = Canary(engine, self.learner, prompts=prompts(), seed=0, **settings)
        self.version = 0

    async def step(self) -> dict[str, float]:
        """One optimizer step and its proof; the row."""
        self.version += 1
        self.learner.update(to_learn(self.version), step=0, temperature=1.0, seed=self.version)
        return await self.swap()

    async def swap(self) -> dict[str, float]:
        adapter = self.learner.publish()
        await self.engine.load(adapter, self.version)
        return await self.canary.prove(adapter, self.version)

    async def steps(self, count: int) -> list[dict[str, float]]:
        return [await self.step() for _ in range(count)]


MakeRun = Callable[..., Run]


@pytest.fixture
def make_run(make_model: Callable[..., Any]) -> MakeRun:
    """A run whose engine lies as told; the model tells tokens and positions apart."""

    def make(
        *,
        dtype: str = "float32",
        learning_rate: float = 1e-4,
        engine: Callable[..., Liar] = Liar,
        tolerance: float | None = None,
        adapter_dtype: torch.dtype | None = None,
        merged: bool = False,
        deadline_s: float = 60.0,
        **lies: Any,
    ) -> Run:
        model = make_model(dtype=dtype)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data.mul_(8)
        liar = engine(model, **lies)
        return Run(
            model,
            liar,
            learning_rate=learning_rate,
            tolerance=tolerance,
            adapter_dtype=adapter_dtype,
            merged=merged,
            deadline_s=deadline_s,
        )

    return make


def prove(run: Run, count: int) -> list[dict[str, float]]:
    """The rows of so many steps."""

    async def main() -> list[dict[str, float]]:
        try:
            return await run.steps(count)
        finally:
            await run.engine.close()

    return asyncio.run(main())


PRECISIONS = [("float32", 1e-4), ("float32", 1e-5), ("bfloat16", 1e-4)]


# -- the right weights --


@pytest.mark.parametrize(("dtype", "learning_rate"), PRECISIONS)
def test_the_right_version_is_proved_and_told_from_the_one_before(
    make_run: MakeRun, dtype: str, learning_rate: float
) -> None:
    for row in prove(make_run(dtype=dtype, learning_rate=learning_rate), 3):
        assert row["canary/mean_nats"] <= row["canary/max_nats"] < 1e-4
        assert row["canary/identified"] == 1
        assert row["canary/sigmas"] > 5
        assert row["time/canary_s"] > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_weights_are_proved_by_a_learner_that_rounds_alike_and_by_no_other(
    make_run: MakeRun, dtype: str
) -> None:
    options = {"dtype": dtype, "learning_rate": 1e-3, "engine": Merges}
    for row in prove(make_run(**options, merged=True), 3):
        assert row["canary/max_nats"] < 1e-4
        assert row["canary/identified"] == 1
    apart = prove(make_run(**options, tolerance=10.0), 1)[0]["canary/mean_nats"]
    assert apart > 1e-3 if dtype == "bfloat16" else apart < 1e-4


def test_merged_weights_of_the_version_before_are_found_out(make_run: MakeRun) -> None:
    options = {"dtype": "bfloat16", "learning_rate": 1e-3, "engine": Merges, "merged": True}
    with pytest.raises(WrongWeights, match="seems to serve the bare base"):
        prove(make_run(**options, cold=stale), 1)


def test_rounding_of_a_16_bit_gpus_size_stops_no_run(make_run: MakeRun) -> None:
    random = np.random.default_rng(0)

    def gpu(count: int) -> Any:  # 0.01 nats a token and at times half a nat
        return 0.01 * random.standard_t(2, count) * np.where(random.random(count) < 0.01, 20, 1)

    for row in prove(make_run(noise=gpu, tolerance=5e-2), 4):
        assert 1e-3 < row["canary/mean_nats"] < 5e-2
        assert row["canary/identified"] < 1  # a step of 1e-4 is lost in it


def test_adapters_that_the_engine_rounds_are_compared_with_rounded_ones(make_run: MakeRun) -> None:
    run = make_run(cold=rounded, learning_rate=1e-5, adapter_dtype=torch.bfloat16)
    run.learner.restore(shaken(run.learner.publish(), by=0.05), run.learner.optimizer_state())
    assert [row["canary/mean_nats"] < 1e-4 for row in prove(run, 3)] == [True] * 3


def test_versions_that_are_the_same_pass_and_the_row_says_that_they_were_not_told_apart(
    make_run: MakeRun,
) -> None:
    run = make_run()

    async def main() -> list[dict[str, float]]:
        fresh = await run.swap()  # equals the base exactly
        moved = await run.step()
        run.version += 1
        return [fresh, moved, await run.swap()]

    rows = asyncio.run(main())
    assert [row["canary/identified"] for row in rows] == [0, 1, 0]
    assert rows[0]["canary/sigmas"] == rows[2]["canary/sigmas"] == 0


def test_an_engine_that_does_not_score_is_proved_by_what_it_samples_and_asked_once(make_run: MakeRun) -> None:
    run = make_run(scores=False)
    assert [row["canary/identified"] for row in prove(run, 2)] == [1, 1]
    assert run.engine.refused == len(prompts())


def test_a_version_that_the_learner_has_gone_past_is_proved(make_run: MakeRun) -> None:
    run = make_run()

    async def main() -> dict[str, float]:
        await run.step()
        adapter = run.learner.publish()
        run.learner.update(to_learn(9), step=0, temperature=1.0, seed=9)
        await run.engine.load(adapter, 2)
        return await run.canary.prove(adapter, 2)

    assert asyncio.run(main())["canary/max_nats"] < 1e-4


def test_a_version_can_be_proved_again_after_the_engine_was_restarted(make_run: MakeRun) -> None:
    run = make_run()

    async def main() -> list[dict[str, float]]:
        return [*await run.steps(2), await run.swap(), await run.step()]

    assert [row["canary/identified"] for row in asyncio.run(main())] == [1, 1, 1, 1]


# -- the wrong ones --


@pytest.mark.parametrize(("dtype", "learning_rate"), PRECISIONS)
def test_a_version_that_is_one_step_old_stops_the_run_and_is_named(
    make_run: MakeRun, dtype: str, learning_rate: float
) -> None:
    run = make_run(dtype=dtype, learning_rate=learning_rate)

    async def main() -> None:
        await run.steps(2)
        run.engine.serve(stale)
        await run.step()

    with pytest.raises(
        WrongWeights, match="version 3 was loaded.* seems to serve version 2, the one before:"
    ):
        asyncio.run(main())


def test_old_weights_behind_a_cached_prefix_alone_stop_the_run(make_run: MakeRun) -> None:
    run = make_run()

    async def main() -> None:
        await run.steps(2)
        run.engine.serve(right, warm=stale)
        await run.step()

    said = "serve version 2, the one before: .* tokens sampled behind a cached prefix differ"
    with pytest.raises(WrongWeights, match=said):
        asyncio.run(main())


def test_prefixes_that_were_computed_under_old_weights_stop_the_run(make_run: MakeRun) -> None:
    run = make_run(engine=StalePrefixes)
    with pytest.raises(
        WrongWeights, match="serve it behind prefixes that were cached under other weights: .* sampled tokens"
    ):
        prove(run, 1)


def test_a_far_off_adapter_stops_the_run_as_none_that_is_known(make_run: MakeRun) -> None:
    with pytest.raises(WrongWeights, match="version 1 was loaded.* seems to serve none that is known"):
        prove(make_run(cold=far_off), 1)


@pytest.mark.parametrize("learning_rate", [1e-5, 1e-2])
def test_the_bare_base_stops_the_run_and_is_named(make_run: MakeRun, learning_rate: float) -> None:
    run = make_run(learning_rate=learning_rate)

    async def main() -> None:
        await run.steps(3)
        run.engine.serve(bare)
        await run.step()

    with pytest.raises(WrongWeights, match="version 4 was loaded.* seems to serve the bare base:"):
        asyncio.run(main())


def test_an_engine_that_never_takes_an_adapter_is_found_at_the_first(make_run: MakeRun) -> None:
    with pytest.raises(WrongWeights, match="seems to serve the bare base:"):
        prove(make_run(cold=bare), 1)


def test_an_engine_that_takes_no_step_is_found_once_steps_too_small_to_see_add_up(make_run: MakeRun) -> None:
    random = np.random.default_rng(1)
    run = make_run(
        cold=lambda loads: loads[min(len(loads) - 1, 1)],
        noise=lambda count: random.normal(0, 0.01, count),
        tolerance=5e-2,
        learning_rate=2e-5,
    )
    run.learner.restore(shaken(run.learner.publish(), by=0.05), run.learner.optimizer_state())
    rows: list[dict[str, float]] = []

    async def main() -> None:
        for _ in range(40):
            rows.append(await run.step())

    with pytest.raises(WrongWeights, match="seems to serve version 1: "):
        asyncio.run(main())
    first, *later = [row["canary/identified"] for row in rows]
    assert first == 1  # version 1 is far from the base
    assert len(later) > 2
    assert not any(later)


def test_a_version_that_the_engine_reports_and_was_not_given_stops_the_run(make_run: MakeRun) -> None:
    with pytest.raises(WrongWeights, match="version 1 was loaded.* says that it sampled with version 0"):
        prove(make_run(late=1), 1)


def test_right_weights_that_are_computed_too_coarsely_are_called_so(make_run: MakeRun) -> None:
    random = np.random.default_rng(2)
    run = make_run(noise=lambda count: random.normal(0, 5e-3, count), learning_rate=1e-2)
    with pytest.raises(WrongWeights, match="seems to serve it in another precision"):
        prove(run, 1)


def test_logprobs_that_are_no_numbers_stop_the_run(make_run: MakeRun) -> None:
    run = make_run(noise=lambda count: np.full(count, np.nan))
    with pytest.raises(WrongWeights, match="none that is known: .* differ by nan nats"):
        prove(run, 1)


# -- what a proof does beside --


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_proof_leaves_the_learner_as_it_was_to_the_bit(make_run: MakeRun, dtype: str) -> None:
    run = make_run(dtype=dtype, learning_rate=1e-2)

    async def main() -> None:
        await run.steps(2)
        before = run.learner.publish().tensors
        await run.swap()
        run.engine.serve(far_off)
        with pytest.raises(WrongWeights):
            await run.swap()
        for name, tensor in run.learner.publish().tensors.items():
            assert torch.equal(tensor, before[name])

    asyncio.run(main())


def test_a_score_that_fails_leaves_the_learner_as_it_was(make_run: MakeRun) -> None:
    learner = make_run().learner
    before = learner.publish()
    too_long = to_learn(0)[0]
    long = Sample(
        task_id="long",
        sibling=0,
        token_ids=np.resize(too_long.token_ids, 600),
        mask=np.arange(600) > 0,
        logprobs=np.zeros(600),
        rewards=np.zeros(600),
        versions=np.zeros(600),
    )
    with pytest.raises(UserError, match="600 tokens"):
        learner.score_as(shaken(before, by=1.0), [long], temperature=1.0)
    for name, tensor in learner.publish().tensors.items():
        assert torch.equal(tensor, before.tensors[name])


def test_the_same_is_asked_after_every_swap_all_of_a_kind_at_once(make_run: MakeRun) -> None:
    run = make_run(learning_rate=1e-9)
    prove(run, 2)
    asked = [(prompt.tolist(), sampling) for prompt, sampling in run.engine.requests]
    half = len(asked) // 2
    assert half == 2 * len(prompts())
    assert asked[:half] == asked[half:]
    assert [prompt for prompt, _ in asked[: len(prompts())]] == [prompt.tolist() for prompt in prompts()]
    assert len({sampling.seed for _, sampling in asked}) == half


def test_an_opening_that_prompts_share_counts_once(make_run: MakeRun) -> None:
    run = make_run()
    first, *_ = prompts()
    longer = np.concatenate([first, first[:5]])
    once, both = (
        Canary(run.engine, run.learner, prompts=given, seed=0) for given in ([longer], [first, longer, first])
    )

    async def main() -> list[int]:
        await run.engine.load(adapter := run.learner.publish(), 1)
        return [int((await canary._hear(1)).kinds.tolist().count(0)) for canary in (once, both)] + [
            len(adapter.tensors)
        ]

    alone, together, _ = asyncio.run(main())
    assert alone == together == len(longer) - 1


@pytest.mark.parametrize("given", [[], [[5]], [[5], [6]]])
def test_prompts_that_prove_nothing_are_refused(make_run: MakeRun, given: Sequence[Sequence[int]]) -> None:
    run = make_run()
    with pytest.raises(ValueError, match="none with a second token"):
        Canary(run.engine, run.learner, prompts=[np.array(ids, np.int32) for ids in given], seed=0)


def test_an_engine_that_samples_nothing_has_failed(make_run: MakeRun) -> None:
    run = make_run()

    async def silent(prompt_ids: IntArray, sampling: Sampling) -> Completion:
        empty = np.zeros(0, np.int32)
        return Completion(empty, empty.astype(np.float32), empty, "aborted")

    run.engine.generate = silent  # type: ignore[method-assign]
    with pytest.raises(EngineError, match="sampled no token"):
        prove(run, 1)


def test_an_engine_that_does_not_answer_has_failed(make_run: MakeRun) -> None:
    run = make_run(deadline_s=0.05)

    async def hang(token_ids: IntArray, temperature: float) -> FloatArray:
        await asyncio.Event().wait()
        raise AssertionError

    run.engine.score = hang  # type: ignore[method-assign]
    with pytest.raises(EngineError, match=r"took over 0.05 s to prove .*rollout.request_deadline_s"):
        prove(run, 1)


# -- the statistic --


def noisy(seed: int, *, step: float, engine: float, learner: float, served: float, count: int = 200) -> Place:
    """The place of an engine that stands at ``served``; sizes in nats, rounding with the tails of Cauchy."""
    random = np.random.default_rng(seed)
    loaded_by, other_by = learner * random.standard_cauchy((2, count))
    moved = step * random.normal(size=count)
    said = served * moved + engine * random.standard_cauchy(count)
    return locate(*(values.astype(np.float32) for values in (said, moved + loaded_by, other_by)))


def test_rounding_alone_tells_nothing_whatever_its_tails() -> None:
    for seed in range(500):
        engine, learner = 10.0 ** np.random.default_rng(seed).uniform(-4, 0, 2)
        assert not noisy(seed, step=0.0, engine=engine, learner=learner, served=1.0).told


@pytest.mark.parametrize("served", [0, 1])
def test_a_step_above_the_engines_rounding_is_told(served: int) -> None:
    for seed in range(50):
        place = noisy(seed, step=0.01, engine=0.002, learner=0.0, served=served)
        assert place.told
        assert (place.allows(served), place.allows(1 - served)) == (True, False)
        assert np.sign(place.sigmas) == 2 * served - 1


def test_where_rounding_is_small_halfway_is_neither() -> None:
    place = noisy(0, step=0.1, engine=1e-4, learner=1e-4, served=0.55)
    assert (place.allows(0), place.allows(1)) == (False, False)
    assert place.low <= place.middle <= place.high
    assert place.middle == pytest.approx(0.55, abs=0.01)


def test_tokens_that_hardly_moved_have_hardly_a_say() -> None:
    random = np.random.default_rng(0)
    moved = np.where(np.arange(300) < 60, 1e-2, 1e-6) * random.choice([-1, 1], 300)
    other = np.zeros(300, np.float32)
    said = (moved + 1e-5 * random.normal(size=300)).astype(np.float32)
    assert locate(said, moved.astype(np.float32), other).low > 0.9


def test_too_few_tokens_tell_nothing() -> None:
    place = noisy(0, step=0.1, engine=0.0, learner=0.0, served=1.0, count=20)
    assert not place.told
    assert place.allows(0)
    assert place.allows(1)


def test_versions_with_the_same_logprobs_tell_nothing() -> None:
    same = np.linspace(-3, 0, 99, dtype=np.float32)
    place = locate(same - 1, same, same)
    assert not place.told
    assert place.sigmas == 0
