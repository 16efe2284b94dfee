from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, Qwen3Config, Qwen3ForCausalLM

from agentrl.engine import Sampling
from agentrl.engines.batch import Batch, Request
from agentrl.engines.sampling import uniforms
from agentrl.errors import AgentRLError
from agentrl.models import alias, check_forward
from agentrl.types import IntArray

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = 61
SIZES = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
}


def build(name: str) -> Any:
    """A model of random weights whose next tokens depend on all that came before."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        if name == "qwen3":
            model: Any = Qwen3ForCausalLM(Qwen3Config(**SIZES, num_hidden_layers=2))
        else:
            kinds = ["sliding_attention", "full_attention", "sliding_attention"]
            config = Gemma3TextConfig(**SIZES, num_hidden_layers=3, sliding_window=6, layer_types=kinds)
            model = Gemma3ForCausalLM(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(8)
    return model.eval().requires_grad_(False)


@dataclass
class Forwards:
    """A packed model and how many tokens each of its forward passes computed."""

    model: Any
    tokens: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_forward(self.model)
        self.model.base_model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self.tokens.append(kwargs["input_ids"].numel())

    def batch(self, *, rows: int = 4, prefill_tokens: int = 1000) -> Batch:
        self.tokens.clear()
        return Batch(self.model, max_sequences=rows, prefill_tokens=prefill_tokens)


@pytest.fixture(scope="module")
def qwen3() -> Forwards:
    return Forwards(build("qwen3"))


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    """The same models, as transformers runs them."""
    return {name: build(name) for name in ("qwen3", "gemma3")}


def ids(*numbers: int) -> IntArray:
    return np.array(numbers, np.int32)


def words(count: int, *, seed: int = 0) -> IntArray:
    return np.random.default_rng([seed, count]).integers(0, WORDS, count, dtype=np.int32)


def ask(prompt: IntArray, *, tokens: int = 5, seed: int = 0, **settings: Any) -> Request:
    return Request(prompt, Sampling(max_tokens=tokens, seed=seed, **settings))


def run(batch: Batch, *requests: Request) -> None:
    """Admit all at once and decode to the end."""
    left, fresh = set(requests), list(requests)
    while left:
        left.difference_update(batch.advance(fresh))
        fresh = []


def next_turn(request: Request, *new: int, **changes: Any) -> Request:
    prompt = np.concatenate([request.prompt_ids, request.token_ids, ids(*new)])
    return Request(prompt, replace(request.sampling, **changes))


def distribution(plain: Any, request: Request) -> torch.Tensor:
    """(C, V) float64: what transformers would sample each of the completion's tokens from."""
    whole = torch.from_numpy(np.concatenate([request.prompt_ids, request.token_ids])).long()
    with torch.no_grad():
        logits = plain(input_ids=whole[None], use_cache=False).logits[0, len(request.prompt_ids) - 1 : -1]
    probabilities: torch.Tensor = (logits.double() / (request.sampling.temperature or 1.0)).softmax(-1)
    return probabilities


def check_alone(plain: Any, request: Request) -> None:
    """The request was answered as a naive sampler would have answered it, alone and without a cache."""
    sampling, count = request.sampling, len(request.token_ids)
    probabilities = distribution(plain, request)
    tokens = torch.from_numpy(request.token_ids).long()
    chosen = probabilities.gather(1, tokens[:, None])[:, 0]
    assert torch.allclose(torch.from_numpy(request.logprobs).double(), chosen.log(), atol=1e-5)
    if sampling.temperature == 0:
        assert (chosen >= probabilities.amax(-1) - 1e-5).all()
    else:
        uniform = torch.from_numpy(uniforms(np.full(count, sampling.seed, np.uint64), np.arange(count)))
        above = probabilities.cumsum(-1).gather(1, tokens[:, None])[:, 0]
        assert ((above - chosen - 1e-5 <= uniform) & (uniform <= above + 1e-5)).all()
    said = set(request.token_ids[:-1].tolist())
    assert not said & set(sampling.stop_token_ids)
    if request.finish == "stop":
        assert request.token_ids[-1] in sampling.stop_token_ids
    if request.finish == "length":
        assert count == sampling.max_tokens
        assert request.token_ids[-1] not in sampling.stop_token_ids


# -- what is computed --


def test_a_turn_computes_only_its_new_tokens(qwen3: Forwards, plain: dict[str, Any]) -> None:
    batch = qwen3.batch()
    first = ask(words(30), tokens=4)
    run(batch, first)
    assert qwen3.tokens == [30, 1, 1, 1]  # the last token is sampled, never fed
    second = next_turn(first, 7, 8, 9)
    run(batch, second)
    assert qwen3.tokens[4:] == [1 + 3, 1, 1, 1]
    third = next_turn(second, max_tokens=1)
    run(batch, third)
    assert qwen3.tokens[8:] == [1]
    for request in (first, second, third):
        check_alone(plain["qwen3"], request)


def test_identical_prompts_are_computed_once(qwen3: Forwards, plain: dict[str, Any]) -> None:
    batch = qwen3.batch(rows=6)
    same = [ask(words(20), seed=seed) for seed in range(4)]
    other = ask(words(11), tokens=3)
    run(batch, same[0], other, *same[1:])
    assert qwen3.tokens[0] == 20 + 11
    assert len({request.token_ids.tobytes() for request in same}) > 1
    for request in (*same, other):
        check_alone(plain["qwen3"], request)


def test_a_prompt_longer_than_the_budget_is_computed_in_pieces(
    qwen3: Forwards, plain: dict[str, Any]
) -> None:
    batch = qwen3.batch(prefill_tokens=16)
    requests = [ask(words(length), tokens=2) for length in (50, 3, 16, 1)]
    run(batch, *requests)
    assert qwen3.tokens == [16, 16, 16, 16, 6, 4]
    for request in requests:
        check_alone(plain["qwen3"], request)


def test_siblings_with_identical_pasts_go_on_from_a_row_each(qwen3: Forwards, plain: dict[str, Any]) -> None:
    batch = qwen3.batch(rows=3)
    siblings = [ask(words(12), seed=5, tokens=3) for _ in range(3)]
    run(batch, *siblings)
    second = [next_turn(sibling, 4, new, seed=new) for sibling, new in zip(siblings, (7, 8, 7), strict=True)]
    qwen3.tokens.clear()
    run(batch, *second)
    assert qwen3.tokens[0] == 2 * 3  # two different prompts, of a stop token and two words each
    for request in second:
        check_alone(plain["qwen3"], request)


def test_a_past_longer_than_the_prompt_or_of_another_text_is_not_used(
    qwen3: Forwards, plain: dict[str, Any]
) -> None:
    batch = qwen3.batch(rows=3)
    held = ask(words(12), tokens=6)
    run(batch, held)
    whole = np.concatenate([held.prompt_ids, held.token_ids])
    rewritten = whole.copy()
    rewritten[3] = (rewritten[3] + 1) % WORDS
    again, exact, changed = ask(held.prompt_ids, seed=9), ask(whole[:-1]), ask(rewritten)
    for request in (again, exact, changed):
        qwen3.tokens.clear()
        run(batch, request)
        assert qwen3.tokens[0] == len(request.prompt_ids)
        check_alone(plain["qwen3"], request)


def test_the_longest_past_is_used(qwen3: Forwards) -> None:
    batch = qwen3.batch(rows=3)
    first = ask(words(12), tokens=6)
    second = ask(first.prompt_ids, tokens=2)
    run(batch, first, second)
    assert (first.token_ids[:2] == second.token_ids).all()
    qwen3.tokens.clear()
    run(batch, next_turn(first, 5))
    assert qwen3.tokens[0] == 2


def test_the_row_that_rested_longest_is_overwritten(qwen3: Forwards, plain: dict[str, Any]) -> None:
    batch = qwen3.batch(rows=3)
    talks = [ask(words(10, seed=seed), tokens=3) for seed in range(3)]
    for talk in talks:
        run(batch, talk)
    talks[0] = next_turn(talks[0], 1)
    run(batch, talks[0])  # 1 has rested longest now
    run(batch, ask(words(9), tokens=3))
    for place, computed in ((0, 2), (2, 2), (1, 10 + 3 + 1)):
        talk = next_turn(talks[place], 1)
        qwen3.tokens.clear()
        run(batch, talk)
        assert qwen3.tokens[0] == computed
        check_alone(plain["qwen3"], talk)


def test_a_new_conversation_does_not_push_out_one_that_goes_on_with_it(qwen3: Forwards) -> None:
    batch = qwen3.batch(rows=2)
    oldest, over = ask(words(10), tokens=3), ask(words(14), tokens=3)
    run(batch, oldest)
    run(batch, over)
    qwen3.tokens.clear()
    run(batch, ask(words(7), tokens=3), next_turn(oldest, 1))
    assert qwen3.tokens[0] == 7 + 2


def test_the_cache_grows_with_the_conversation(qwen3: Forwards, plain: dict[str, Any]) -> None:
    batch = qwen3.batch(rows=3)
    requests = [ask(words(120), tokens=40), ask(words(3), tokens=50), ask(words(300), tokens=3)]
    run(batch, *requests)
    long = next_turn(requests[0], *words(100).tolist(), max_tokens=30)
    run(batch, long)
    for request in (*requests, long):
        check_alone(plain["qwen3"], request)


# -- who else is there does not matter --


def test_a_seed_gives_the_same_tokens_whoever_else_is_in_the_batch(qwen3: Forwards) -> None:
    alone = ask(words(15), tokens=12, seed=42)
    run(qwen3.batch(), alone)
    crowd = [ask(words(n), tokens=20 - n, seed=n) for n in (3, 9, 15, 17)]
    again = ask(words(15), tokens=12, seed=42)
    other = ask(words(15), tokens=12, seed=43)
    run(qwen3.batch(rows=6), crowd[0], again, *crowd[1:], other)
    assert again.token_ids.tolist() == alone.token_ids.tolist()
    assert again.logprobs == pytest.approx(alone.logprobs, abs=1e-5)
    assert other.token_ids.tolist() != alone.token_ids.tolist()


@pytest.mark.slow
@given(st.integers(0, 10_000), st.sampled_from(["qwen3", "gemma3"]))
@settings(max_examples=15, deadline=None)
def test_whatever_the_schedule_each_request_is_answered_as_alone(
    packed: dict[str, Forwards], plain: dict[str, Any], seed: int, name: str
) -> None:
    generator = random.Random(seed)
    rows = generator.randint(1, 4)
    batch = packed[name].batch(rows=rows, prefill_tokens=generator.choice([1, 7, 40]))
    waiting = deque(random_request(generator) for _ in range(generator.randint(1, 8)))
    running: set[Request] = set()
    answered = 0
    while waiting or running:
        batch.interrupted.clear()
        room = generator.randint(0 if running else 1, rows - len(running)) if len(running) < rows else 0
        fresh = [waiting.popleft() for _ in range(min(room, len(waiting)))]
        running.update(fresh)
        if generator.random() < 0.7:
            batch.interrupted.set()
        if generator.random() < 0.1:
            generator.choice(sorted(running, key=lambda request: request.sampling.seed)).cancelled = True
        for request in batch.advance(fresh):
            running.remove(request)
            assert (request.finish == "aborted") == request.cancelled
            check_alone(plain[name], request)
            answered += 1
            if not request.cancelled and len(request.prompt_ids) < 150 and generator.random() < 0.6:
                new = [generator.randrange(WORDS) for _ in range(generator.randint(0, 9))]
                waiting.append(next_turn(request, *new, seed=generator.randrange(2**63)))
    assert answered


@pytest.fixture(scope="module")
def packed(qwen3: Forwards) -> dict[str, Forwards]:
    return {"qwen3": qwen3, "gemma3": Forwards(build("gemma3"))}


def random_request(generator: random.Random) -> Request:
    text = words(generator.choice([1, 5, 30, 125]), seed=generator.randrange(2))  # some are identical
    return ask(
        text,
        tokens=generator.choice([1, 2, 9]),
        seed=generator.randrange(2**63),
        temperature=generator.choice([0.0, 0.7, 1.0, 1.5]),
        stop_token_ids=tuple(range(generator.choice([0, 0, 8]))),
    )


# -- how requests end --


def test_a_stop_token_ends_a_completion_and_belongs_to_it(qwen3: Forwards) -> None:
    free = ask(words(8), tokens=10)
    run(qwen3.batch(), free)
    stop = int(free.token_ids[4])
    first = free.token_ids.tolist().index(stop)
    stopped = ask(words(8), tokens=10, stop_token_ids=(WORDS - 1, stop))
    run(qwen3.batch(), stopped)
    assert (free.finish, stopped.finish) == ("length", "stop")
    assert stopped.token_ids.tolist() == free.token_ids[: first + 1].tolist()
    assert len(stopped.logprobs) == first + 1


def test_a_stop_token_that_is_also_the_last_allowed_one_is_a_stop(qwen3: Forwards) -> None:
    free = ask(words(8), tokens=1)
    run(qwen3.batch(), free)
    stopped = ask(words(8), tokens=1, stop_token_ids=(int(free.token_ids[0]),))
    run(qwen3.batch(), stopped)
    assert (free.finish, stopped.finish) == ("length", "stop")


def test_a_cancelled_request_gives_its_row_up_at_the_next_token(
    qwen3: Forwards, plain: dict[str, Any]
) -> None:
    batch = qwen3.batch(rows=1)
    request = ask(words(8), tokens=100)
    batch.interrupted.set()
    assert batch.advance([request]) == []
    request.cancelled = True
    follower = ask(words(5), tokens=3)
    batch.interrupted.clear()
    assert request in batch.advance([follower])
    assert request.finish == "aborted"
    assert len(request.token_ids) == 2  # one with the prompt, one more
    assert batch.advance([]) == [follower]
    check_alone(plain["qwen3"], request)
    check_alone(plain["qwen3"], follower)


def test_logprobs_are_of_the_filtered_distribution(qwen3: Forwards, plain: dict[str, Any]) -> None:
    requests = [ask(words(8), tokens=6, seed=seed, top_k=3, temperature=1.5) for seed in range(4)]
    run(qwen3.batch(), *requests)
    for request in requests:
        likeliest = distribution(plain["qwen3"], request).topk(3)
        tokens = torch.from_numpy(request.token_ids).long()[:, None]
        share = likeliest.values / likeliest.values.sum(-1, keepdim=True)
        expected = (share * (likeliest.indices == tokens)).sum(-1)
        assert torch.from_numpy(request.logprobs).double().exp() == pytest.approx(expected, abs=1e-5)


# -- trouble --


def test_other_weights_make_the_past_worthless(qwen3: Forwards, plain: dict[str, Any]) -> None:
    batch = qwen3.batch()
    first = ask(words(12), tokens=3)
    run(batch, first)
    batch.serve(qwen3.model)
    qwen3.tokens.clear()
    second = next_turn(first, 2)
    run(batch, second)
    assert qwen3.tokens[0] == len(second.prompt_ids)
    check_alone(plain["qwen3"], second)


def test_logits_that_are_not_finite_are_an_error_that_leaves_nothing_behind(plain: dict[str, Any]) -> None:
    model = alias(build("qwen3"))
    forwards = Forwards(model)
    batch = forwards.batch(rows=2)
    first = ask(words(12), tokens=3)
    run(batch, first)
    norm = model.model.norm.weight.data
    kept = norm.clone()
    norm.fill_(torch.nan)
    with pytest.raises(AgentRLError, match="Qwen3ForCausalLM gave logits that are not finite"):
        run(batch, next_turn(first, 2))
    norm.copy_(kept)
    second = [next_turn(first, 2), ask(words(30))]
    run(batch, *second)
    for request in second:
        check_alone(plain["qwen3"], request)


def test_half_precision_stays_finite_next_to_rows_of_any_length(qwen3: Forwards) -> None:
    forwards = Forwards(build("gemma3").bfloat16())
    batch = forwards.batch(rows=3)
    requests = [ask(words(n), tokens=m, seed=n) for n, m in ((1, 40), (140, 3), (9, 20))]
    run(batch, *requests)
    talk = [next_turn(request, 1, 2) for request in requests]
    run(batch, *talk)
    for request in (*requests, *talk):
        assert np.isfinite(request.logprobs).all()
        assert (request.logprobs <= 0).all()
