"""Updates through the real model: what the gradient depends on, what an adapter is, what is refused."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from agentrl.batches import make_batches
from agentrl.checkpoint import write_adapter
from agentrl.config import AlgorithmConfig, BatchConfig, LoraConfig, OptimizerConfig
from agentrl.engine import Adapter
from agentrl.errors import BadConfig, Diverged
from agentrl.learner import Learner, learning_rate_factor
from agentrl.types import Sample

VOCABULARY = 300
Gradient = dict[int, torch.Tensor]
MakeLearner = Callable[..., Learner]


def sample(length: int, *, seed: int, advantage: float = 0.0) -> Sample:
    """Random tokens, about half of them trained."""
    random = np.random.default_rng(seed)
    mask = random.random(length) < 0.5
    mask[0], mask[-1] = False, True
    return Sample(
        task_id=str(seed),
        sibling=0,
        token_ids=random.integers(0, VOCABULARY, length),
        mask=mask,
        logprobs=np.where(mask, -random.exponential(3.0, length), 0.0),
        rewards=np.zeros(length),
        versions=np.where(mask, 0, -1),
        advantages=np.where(mask, advantage, 0.0),
    )


def samples(count: int = 8) -> list[Sample]:
    return [
        sample(6 + 5 * (seed % 4), seed=seed, advantage=1.0 - 0.37 * seed if seed % 3 else -0.5)
        for seed in range(count)
    ]


@pytest.fixture
def make_learner(make_model: Callable[..., Any]) -> MakeLearner:
    """A learner in float64 whose adapter is no longer the zero that it begins with."""

    def make(
        *,
        dtype: str = "float64",
        seed: int = 0,
        fresh: bool = False,
        lora: dict[str, Any] | None = None,
        algorithm: dict[str, Any] | None = None,
        optimizer: dict[str, Any] | None = None,
        **batch: Any,
    ) -> Learner:
        model = make_model(dtype=dtype)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data.mul_(8)  # so that tokens and positions tell
        learner = Learner(
            model,
            lora=LoraConfig(**{"r": 4, "train_norms": dtype != "bfloat16"} | (lora or {})),
            algorithm=AlgorithmConfig(**algorithm or {}),
            optimizer=OptimizerConfig(**{"grad_clip": 1e9, "schedule": "constant"} | (optimizer or {})),
            batch=BatchConfig(**{"tokens_per_microbatch": 64} | batch),
            steps=10,
            seed=seed,
        )
        if not fresh:
            shake(learner)
        return learner

    return make


def shake(learner: Learner) -> None:
    """Move every weight of the adapter by a seeded amount."""
    adapter, generator = learner.publish(), torch.Generator().manual_seed(5)
    moved = {
        name: tensor + 0.2 * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
        for name, tensor in sorted(adapter.tensors.items())
    }
    learner.restore(Adapter(adapter.config, moved), learner.optimizer_state())


def update(learner: Learner, given: Sequence[Sample], *, step: int = 0, seed: int = 0) -> dict[str, float]:
    return learner.update(given, step=step, temperature=1.0, seed=seed)


def gradient(learner: Learner) -> Gradient:
    """The gradient of a learner's first step, from AdamW's first moment."""
    state = learner.optimizer_state()
    share = 1 - state["param_groups"][0]["betas"][0]
    return {index: moments["exp_avg"] / share for index, moments in state["state"].items()}


def distance(one: Gradient, other: Gradient) -> float:
    """Relative to the norm of the first."""
    assert one.keys() == other.keys()
    norm = math.sqrt(sum(float(value.square().sum()) for value in one.values()))
    apart = math.sqrt(sum(float((one[key] - other[key]).square().sum()) for key in one))
    assert norm > 0
    return apart / norm


# -- what the gradient depends on --


@pytest.mark.parametrize("algorithm", [{}, {"kl": 0.1}, {"importance": "truncate"}, {"importance": "mask"}])
def test_loss_and_gradient_do_not_depend_on_how_the_step_is_cut(
    make_learner: MakeLearner, algorithm: dict[str, Any]
) -> None:
    ways = [
        (samples(), {"tokens_per_microbatch": 21}),
        (samples(), {"tokens_per_microbatch": 50, "logprob_rows": 3}),
        (samples()[::-1], {"tokens_per_microbatch": 10_000}),
        (samples(), {"tokens_per_microbatch": 50, "activation_checkpointing": True}),
    ]
    learners = [make_learner(algorithm=algorithm, **batch) for _, batch in ways]
    rows = [update(learner, given) for learner, (given, _) in zip(learners, ways, strict=True)]
    first, *others = map(gradient, learners)
    assert len(first) == len(learners[0].optimization.parameters)
    for other in others:
        assert distance(first, other) < 1e-5
    for row in rows[1:]:
        assert row == pytest.approx(rows[0], rel=1e-5, abs=1e-9)


def test_siblings_that_share_their_opening_give_the_gradient_that_they_give_alone(
    make_learner: MakeLearner,
) -> None:
    opening = np.random.default_rng(7).integers(0, VOCABULARY, 9)
    given: list[Sample] = []
    for one in samples(6):
        mask = np.concatenate([np.zeros(9, bool), [True], one.mask[1:]])
        padded = {
            name: np.concatenate([np.zeros(9), getattr(one, name)])
            for name in ("logprobs", "rewards", "advantages")
        }
        padded["advantages"] = np.where(mask, padded["advantages"].max() + 0.3, 0.0)
        given.append(
            dataclasses.replace(
                one,
                task_id="shared",
                token_ids=np.concatenate([opening, one.token_ids]),
                mask=mask,
                versions=np.where(mask, 0, -1),
                **padded,
            )
        )
    (batch,) = make_batches(given, tokens_per_microbatch=10_000)
    assert len(batch.token_ids) == 9 + sum(len(one.token_ids) - 9 for one in given)
    apart = [dataclasses.replace(one, task_id=str(at)) for at, one in enumerate(given)]
    learners = make_learner(tokens_per_microbatch=10_000), make_learner(tokens_per_microbatch=10_000)
    rows = [update(learner, way) for learner, way in zip(learners, (given, apart), strict=True)]
    assert rows[0] == pytest.approx(rows[1], rel=1e-6, abs=1e-9)
    assert distance(*map(gradient, learners)) < 1e-6


def test_untrained_tokens_have_exactly_no_gradient(make_learner: MakeLearner) -> None:
    learner, given = make_learner(tokens_per_microbatch=10_000), samples()
    seen: list[torch.Tensor] = []

    def remember(module: Any, args: Any, output: Any) -> None:
        output.last_hidden_state.retain_grad()
        seen.append(output.last_hidden_state)

    learner.policy.get_base_model().base_model.register_forward_hook(remember)
    (batch,) = learner.optimization.batches(given)
    update(learner, given)
    (hidden,) = seen
    assert hidden.grad is not None
    carries = hidden.grad[0].abs().sum(-1) > 0
    assert carries.nonzero().flatten().tolist() == (batch.trained - 1).tolist()


def test_samples_without_an_advantage_are_left_out_without_changing_the_gradient(
    make_learner: MakeLearner,
) -> None:
    idle = [sample(20, seed=50 + seed) for seed in range(5)]
    # The smallest advantage that is not 0 keeps a sample in; its part of the gradient is nothing.
    kept = [dataclasses.replace(one, advantages=np.where(one.mask, 1e-44, 0.0)) for one in idle]
    left_out, computed = make_learner(), make_learner()
    row = update(left_out, [*samples(), *idle])
    whole = update(computed, [*samples(), *kept])
    assert distance(gradient(computed), gradient(left_out)) < 1e-9
    assert row["optimizer/grad_norm"] == pytest.approx(whole["optimizer/grad_norm"], rel=1e-9)
    # Metrics are means over the tokens that were computed.
    alone = update(make_learner(), samples())
    assert row["loss/entropy"] == pytest.approx(alone["loss/entropy"], rel=1e-9)
    assert row["loss/policy"] == pytest.approx(alone["loss/policy"], rel=1e-9)
    ratio = alone["optimizer/grad_norm"] / row["optimizer/grad_norm"]
    trained = sum(one.trained_tokens for one in samples())
    assert ratio == pytest.approx((trained + sum(one.trained_tokens for one in idle)) / trained, rel=1e-6)


def test_minibatches_normalise_by_their_own_tokens_whatever_is_left_out(make_learner: MakeLearner) -> None:
    idle = [sample(20, seed=50 + seed) for seed in range(5)]
    kept = [dataclasses.replace(one, advantages=np.where(one.mask, 1e-44, 0.0)) for one in idle]
    algorithm = {"minibatches": 3}
    left_out, computed = make_learner(algorithm=algorithm), make_learner(algorithm=algorithm)
    update(left_out, [*samples(), *idle], seed=3)
    update(computed, [*samples(), *kept], seed=3)
    for name, tensor in computed.publish().tensors.items():
        torch.testing.assert_close(left_out.publish().tensors[name], tensor, rtol=1e-6, atol=1e-8)


def test_nothing_to_learn_is_no_step(make_learner: MakeLearner) -> None:
    learner = make_learner()
    before = learner.publish().tensors
    assert update(learner, [sample(9, seed=1), sample(12, seed=2)]) == {}
    assert update(learner, []) == {}
    assert not gradient(learner)
    assert all(torch.equal(before[name], tensor) for name, tensor in learner.publish().tensors.items())


def test_the_kl_penalty_alone_moves_the_policy_to_the_base(make_learner: MakeLearner) -> None:
    idle = [sample(15, seed=seed) for seed in range(6)]
    learner = make_learner(algorithm={"kl": 1.0}, optimizer={"learning_rate": 1e-2})
    rows = [update(learner, idle, step=step) for step in range(5)]
    assert rows[-1]["loss/kl"] < 0.8 * rows[0]["loss/kl"]


# -- ratios and references --


def test_the_first_minibatchs_ratio_is_exactly_one_and_the_seconds_is_not(make_learner: MakeLearner) -> None:
    once = update(make_learner(dtype="float32"), samples())
    assert (once["loss/ratio_mean"], once["loss/clip_fraction"], once["loss/policy_kl"]) == (1.0, 0.0, 0.0)
    learner = make_learner(algorithm={"minibatches": 2}, optimizer={"learning_rate": 1e-2})
    assert update(learner, samples())["loss/policy_kl"] > 1e-6


def test_later_minibatches_compare_with_the_weights_before_the_first(make_learner: MakeLearner) -> None:
    # So small a step changes no ratio: what is left is the difference between scoring and training.
    learner = make_learner(algorithm={"minibatches": 4}, optimizer={"learning_rate": 1e-12})
    row = update(learner, samples())
    assert row["loss/ratio_mean"] == pytest.approx(1.0, abs=1e-6)
    assert row["loss/policy_kl"] == pytest.approx(0.0, abs=1e-9)


# -- what sampler and learner differ in --


def sampled_apart(learner: Learner, log_weights: Sequence[float]) -> list[Sample]:
    """The samples, as if drawn where the learner's logprobs are these above the sampler's, in turn."""
    given = samples()
    scored = learner.optimization.score(given, temperature=1.0)
    moved = []
    for one, old in zip(given, scored, strict=True):
        apart = np.zeros(len(one.mask))
        apart[one.mask] = np.resize(log_weights, one.trained_tokens)
        moved.append(dataclasses.replace(one, logprobs=np.where(one.mask, old - apart, 0.0)))
    return moved


@pytest.mark.parametrize("minibatches", [1, 3])
@pytest.mark.parametrize("mode", ["none", "truncate", "mask"])
def test_the_mismatch_metrics_are_those_computed_by_hand(
    make_learner: MakeLearner, mode: str, minibatches: int
) -> None:
    limits = {"truncate": {"importance_cap": 1.5}, "mask": {"importance_cap": 1.5, "importance_floor": 0.6}}
    learner = make_learner(
        algorithm={"importance": mode, "minibatches": minibatches, **limits.get(mode, {})},
        optimizer={"learning_rate": 1e-12},  # so that later minibatches have the first one's logprobs
        tokens_per_microbatch=30,
    )
    given = sampled_apart(learner, [0.2, -0.1, 0.5, -0.6])
    apart = np.concatenate([np.resize([0.2, -0.1, 0.5, -0.6], one.trained_tokens) for one in given])
    weights = np.exp(apart)
    inside = {
        "none": weights > 0,
        "truncate": weights <= 1.5,
        "mask": (weights <= 1.5) & (weights >= 0.6),
    }[mode]
    used = {"none": weights, "truncate": np.minimum(weights, 1.5), "mask": weights * inside}[mode]
    row = update(learner, given)
    assert {name: value for name, value in row.items() if name.startswith("mismatch/")} == pytest.approx(
        {
            "mismatch/mean": np.abs(apart).mean(),
            "mismatch/max": 0.6,
            "mismatch/kl": (weights - 1 - apart).mean(),
            "mismatch/kept": inside.mean(),
            "mismatch/ess": used.sum() ** 2 / (used**2).sum() / len(used),
        },
        abs=1e-5,
    )


def test_an_importance_weight_multiplies_the_gradient_and_what_was_sampled_enters_nowhere_else(
    make_learner: MakeLearner,
) -> None:
    plain, corrected, capped = (
        make_learner(algorithm={"importance": mode}) for mode in ("none", "truncate", "truncate")
    )
    for learner, log_weight in ((plain, 0.4), (corrected, 0.4), (capped, 5.0)):
        row = update(learner, sampled_apart(learner, [log_weight]))
        assert (row["loss/ratio_mean"], row["loss/policy_kl"]) == (1.0, 0.0)
    for learner, weight in ((corrected, math.exp(0.4)), (capped, 2.0)):
        scaled = {index: value * weight for index, value in gradient(plain).items()}
        assert distance(gradient(learner), scaled) < 1e-5
    untouched = make_learner()
    update(untouched, samples())
    assert distance(gradient(untouched), gradient(plain)) == 0.0


def test_the_weights_of_later_minibatches_are_of_the_policy_before_the_first(
    make_learner: MakeLearner,
) -> None:
    algorithm = {"importance": "truncate", "minibatches": 3}
    learner = make_learner(algorithm=algorithm, optimizer={"learning_rate": 3e-2})
    row = update(learner, sampled_apart(learner, [0.3]))
    assert row["loss/policy_kl"] > 1e-4  # the policy moved from one minibatch to the next
    assert row["mismatch/max"] == pytest.approx(0.3, abs=1e-5)
    assert row["mismatch/ess"] == pytest.approx(1.0, abs=1e-6)


def test_a_step_whose_every_token_is_masked_trains_nothing_and_says_so(make_learner: MakeLearner) -> None:
    learner = make_learner(algorithm={"importance": "mask"}, optimizer={"learning_rate": 1.0})
    before = learner.publish().tensors
    row = update(learner, sampled_apart(learner, [3.0, -3.0]))
    assert (row["mismatch/kept"], row["mismatch/ess"], row["optimizer/grad_norm"]) == (0.0, 0.0, 0.0)
    assert all(torch.equal(before[name], tensor) for name, tensor in learner.publish().tensors.items())


def test_the_reference_is_the_base_without_its_adapter(
    make_learner: MakeLearner, tiny_checkpoint: Path
) -> None:
    learner, given = make_learner(algorithm={"kl": 0.1}), samples()
    update(learner, given)
    base = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype="float64")
    for parameter in base.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(8)
    referred = learner.score_reference(given, temperature=0.7)
    adapted = learner.optimization.score(given, temperature=0.7)
    for one, with_adapter in zip(referred, adapted, strict=True):
        expected = plain_logprobs(base, one, temperature=0.7)
        assert one.reference is not None
        np.testing.assert_allclose(one.reference, expected, rtol=1e-5, atol=1e-5)
        assert np.abs(with_adapter - expected)[one.mask].max() > 0.01


@torch.no_grad()
def plain_logprobs(model: Any, one: Sample, *, temperature: float = 1.0) -> np.ndarray[Any, Any]:
    """Logprobs of the trained tokens by transformers alone, 0 elsewhere."""
    ids = torch.tensor(one.token_ids.tolist())
    logits = model(input_ids=ids[None]).logits[0] / temperature
    found = torch.log_softmax(logits[:-1], -1).gather(1, ids[1:, None])[:, 0]
    padded: np.ndarray[Any, Any] = np.concatenate([[0.0], found.numpy()])
    return np.where(one.mask, padded, 0.0)


def test_what_the_sampler_and_the_learner_disagree_about_is_measured(make_learner: MakeLearner) -> None:
    learner, given = make_learner(), samples()
    scored = learner.optimization.score(given, temperature=1.0)
    pairs = list(zip(given, scored, strict=True))
    shifted = [dataclasses.replace(one, logprobs=np.where(one.mask, value - 0.1, 0)) for one, value in pairs]
    row = update(learner, shifted)
    assert row["mismatch/mean"] == pytest.approx(0.1, abs=1e-5)
    assert row["mismatch/max"] == pytest.approx(0.1, abs=1e-4)
    assert row["mismatch/kl"] == pytest.approx(math.expm1(0.1) - 0.1, rel=1e-3)


# -- adapters --


@pytest.mark.parametrize("train_norms", [True, False])
def test_what_is_published_is_an_ordinary_peft_adapter(
    make_learner: MakeLearner, tiny_checkpoint: Path, tmp_path: Path, train_norms: bool
) -> None:
    learner, given = make_learner(lora={"train_norms": train_norms}), samples()
    update(learner, given)
    write_adapter(tmp_path, learner.publish())
    base = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype="float64")
    for parameter in base.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(8)
    loaded = peft.PeftModel.from_pretrained(base, str(tmp_path)).eval()
    for one, scored in zip(given, learner.optimization.score(given, temperature=1.0), strict=True):
        np.testing.assert_allclose(scored, plain_logprobs(loaded, one), rtol=1e-5, atol=1e-5)


def test_a_published_adapter_is_a_copy(make_learner: MakeLearner) -> None:
    learner = make_learner(optimizer={"learning_rate": 0.1})
    published = learner.publish()
    before = {name: tensor.clone() for name, tensor in published.tensors.items()}
    update(learner, samples())
    assert all(torch.equal(before[name], tensor) for name, tensor in published.tensors.items())


def test_a_new_adapter_changes_nothing_and_depends_on_the_seed_alone(make_learner: MakeLearner) -> None:
    state = torch.random.get_rng_state()
    one = make_learner(fresh=True, seed=1).publish().tensors
    torch.rand(3)
    again, other = (make_learner(fresh=True, seed=seed).publish().tensors for seed in (1, 2))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)
    torch.random.set_rng_state(state)
    make_learner(fresh=True)
    assert torch.equal(torch.random.get_rng_state(), state)
    given = samples()
    learner = make_learner(fresh=True)
    pairs = zip(
        learner.optimization.score(given, temperature=1.0),
        learner.score_reference(given, temperature=1.0),
        strict=True,
    )
    assert all(np.array_equal(scored, referred.reference) for scored, referred in pairs)


def test_dropout_depends_on_the_seed_of_the_update_alone(make_learner: MakeLearner) -> None:
    gradients = []
    for seed, consumed in ((1, 0), (1, 5), (2, 0)):
        learner = make_learner(lora={"dropout": 0.5})
        torch.rand(consumed)
        update(learner, samples(), seed=seed)
        gradients.append(gradient(learner))
    assert distance(gradients[0], gradients[1]) == 0
    assert distance(gradients[0], gradients[2]) > 0.01


def test_the_sampler_is_compared_with_a_policy_that_drops_nothing_out(make_learner: MakeLearner) -> None:
    learner = make_learner(lora={"dropout": 0.5})
    scored = learner.optimization.score(samples(), temperature=1.0)
    exact = [dataclasses.replace(s, logprobs=value) for s, value in zip(samples(), scored, strict=True)]
    assert update(learner, exact)["mismatch/max"] < 1e-5


def test_norms_in_half_precision_are_refused(make_learner: MakeLearner) -> None:
    with pytest.raises(BadConfig, match=r"train_norms is true, and the base is in bfloat16.*model.dtype"):
        make_learner(dtype="bfloat16", lora={"train_norms": True}, fresh=True)
    assert update(make_learner(dtype="bfloat16"), samples())["optimizer/grad_norm"] > 0


def test_a_target_module_that_the_model_does_not_have_is_refused(make_learner: MakeLearner) -> None:
    for names in (["k_prjo"], ["q_proj", "k_prjo"]):
        with pytest.raises(BadConfig, match="has 'k_prjo'.*did you mean 'k_proj'.*all-linear.*q_proj"):
            make_learner(lora={"target_modules": names}, fresh=True)
    learner = make_learner(lora={"target_modules": ["q_proj", "layers.1.mlp.down_proj"]}, fresh=True)
    assert sum("down_proj" in name for name in learner.publish().tensors) == 2  # A and B of one layer


def test_a_restored_learner_goes_on_to_the_same_weights(make_learner: MakeLearner) -> None:
    learner = make_learner(optimizer={"learning_rate": 1e-2}, algorithm={"minibatches": 2})
    update(learner, samples(), step=0)
    resumed = make_learner(optimizer={"learning_rate": 1e-2}, algorithm={"minibatches": 2}, seed=9)
    resumed.restore(learner.publish(), learner.optimizer_state())
    for one in (learner, resumed):
        update(one, samples(), step=1, seed=1)
    expected, found = learner.publish().tensors, resumed.publish().tensors
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_restored_learner_has_its_own_settings_of_the_optimizer(make_learner: MakeLearner) -> None:
    learner = make_learner()
    update(learner, samples())
    changed = make_learner(optimizer={"betas": (0.5, 0.6), "weight_decay": 0.25})
    changed.restore(learner.publish(), learner.optimizer_state())
    (group,) = changed.optimization.adamw.param_groups
    assert (group["betas"], group["weight_decay"]) == ((0.5, 0.6), 0.25)


# -- steps --


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_is_refused_and_the_weights_stay(
    make_learner: MakeLearner, value: float
) -> None:
    learner = make_learner()
    before = learner.publish().tensors
    bad = sample(10, seed=3, advantage=value)
    with pytest.raises(Diverged, match=r"the gradient's norm is (nan|inf) at step 4"):
        update(learner, [*samples(), bad], step=4)
    assert all(torch.equal(before[name], tensor) for name, tensor in learner.publish().tensors.items())
    assert not gradient(learner)
    assert update(learner, samples())["optimizer/grad_norm"] > 0  # nothing of it is left behind


def test_the_gradient_is_clipped_to_its_norm(make_learner: MakeLearner) -> None:
    learner = make_learner(optimizer={"grad_clip": 1e-3})
    assert update(learner, samples())["optimizer/grad_norm"] > 1e-2
    norm = math.sqrt(sum(float(value.square().sum()) for value in gradient(learner).values()))
    assert norm == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"schedule": "constant"}, [1, 1, 1, 1, 1]),
        ({"schedule": "linear", "final_fraction": 0.2}, [1, 0.8, 0.6, 0.4, 0.2]),
        ({"schedule": "linear", "final_fraction": 0.0, "warmup_steps": 2}, [1 / 3, 2 / 3, 1, 0.5, 0]),
        (
            {"schedule": "cosine", "final_fraction": 0.0},
            [1, (1 + math.sqrt(0.5)) / 2, 0.5, 0.5 - math.sqrt(0.125), 0],
        ),
        ({"schedule": "constant", "warmup_steps": 1}, [0.5, 1, 1, 1, 1]),
    ],
)
def test_the_learning_rate_rises_and_decays_by_step_count(
    settings: dict[str, Any], expected: list[float]
) -> None:
    optimizer = OptimizerConfig(**settings)
    assert [learning_rate_factor(optimizer, step, 5) for step in range(5)] == pytest.approx(expected)


def test_the_learning_rate_of_a_step_is_the_schedules(make_learner: MakeLearner) -> None:
    learner = make_learner(
        optimizer={"schedule": "linear", "learning_rate": 0.5}, algorithm={"minibatches": 2}
    )
    rates = [update(learner, samples(), step=step)["optimizer/learning_rate"] for step in (0, 9)]
    assert rates == pytest.approx([0.5, 0.05])


def test_figures_say_where_the_update_s_seconds_went(make_learner: MakeLearner) -> None:
    learner = make_learner(algorithm={"minibatches": 2})
    update(learner, samples())
    figures = learner.take_figures()
    assert sorted(figures) == [
        "time/backward_s",
        "time/forward_s",
        "time/optimizer_s",
        "time/score_s",
        "update/tokens",
        "update/trained_tokens",
    ]
    assert min(figures.values()) > 0
    assert not any(learner.take_figures().values())
