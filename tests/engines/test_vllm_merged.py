"""Merged weights and the engine over vLLM, without vLLM: a fake core takes them in place."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from fake_vllm import PROMPT, FakeCore, Vllm, make_settings, sampling, serve, until

from agentrl.config import EngineConfig, RolloutConfig
from agentrl.engine import Adapter
from agentrl.engines.vllm import VLLMEngine
from agentrl.engines.vllm_settings import engine_arguments
from agentrl.engines.vllm_transfer import check_transfer
from agentrl.engines.vllm_worker import WeightsReader, checksum
from agentrl.errors import BadConfig, WrongWeights
from agentrl.serving import Served, open_engine
from agentrl.types import Completion

LAYER = "model.layers.0."
SHAPES: dict[str, Any] = {
    "model.embed_tokens.weight": (10, 6),
    f"{LAYER}self_attn.q_proj.weight": (8, 6),
    f"{LAYER}self_attn.q_proj.bias": (8,),
    f"{LAYER}self_attn.k_proj.weight": (4, 6),
    f"{LAYER}self_attn.v_proj.weight": (4, 6),
    f"{LAYER}self_attn.o_proj.weight": (6, 8),
    f"{LAYER}input_layernorm.weight": (6,),
}
NAMES = list(SHAPES)
QKV, O_PROJ, NORM = NAMES[1:5], NAMES[5], NAMES[6]


@pytest.fixture
def base() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def adapter(seed: int = 1, *, layers: tuple[str, ...] = ("self_attn.q_proj",), norm: bool = False) -> Adapter:
    """Rank 2 with alpha 6: B A times 3."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for layer in layers:
        rows, columns = SHAPES[f"{LAYER}{layer}.weight"]  # type: ignore[misc]
        tensors[f"base_model.model.{LAYER}{layer}.lora_A.weight"] = torch.randn(
            (2, columns), generator=generator
        )
        tensors[f"base_model.model.{LAYER}{layer}.lora_B.weight"] = torch.randn(
            (rows, 2), generator=generator
        )
    if norm:
        tensors[f"base_model.model.{NORM}"] = torch.randn(6, generator=generator)
    saved = ["input_layernorm"] if norm else None
    return Adapter({"r": 2, "lora_alpha": 6, "modules_to_save": saved}, tensors)


def merged(base: Mapping[str, torch.Tensor], given: Adapter, name: str) -> torch.Tensor:
    layer = f"base_model.model.{name.removesuffix('.weight')}"
    return base[name] + 3 * given.tensors[f"{layer}.lora_B.weight"] @ given.tensors[f"{layer}.lora_A.weight"]


# -- what is sent --


def test_what_is_fused_with_an_adapted_layer_goes_along_and_the_rest_stays(base: Any) -> None:
    given = adapter()

    async def use(engine: VLLMEngine, vllm: Vllm) -> FakeCore:
        await engine.load(given, 1)
        return vllm.cores[0]

    core = serve(use, base=base, merge=True)
    assert core.sent == [QKV]
    torch.testing.assert_close(core.weights[QKV[0]], merged(base, given, QKV[0]))
    for name in QKV[1:]:
        assert torch.equal(core.weights[name], base[name])


def test_every_version_is_merged_afresh_and_the_bare_base_comes_back_bit_for_bit(base: Any) -> None:
    adapters = [adapter(seed) for seed in range(3)]

    async def use(engine: VLLMEngine, vllm: Vllm) -> FakeCore:
        for version, given in enumerate(adapters, start=1):
            await engine.load(given, version)
        torch.testing.assert_close(vllm.cores[0].weights[QKV[0]], merged(base, adapters[-1], QKV[0]))
        await engine.load(None, 4)
        assert engine.version == 4
        await engine.load(None, 5)
        return vllm.cores[0]

    core = serve(use, base=base, merge=True)
    assert core.sent == [QKV] * 4  # nothing is left to restore at the fifth
    assert all(torch.equal(core.weights[name], base[name]) for name in QKV)


def test_what_the_version_before_changed_and_this_one_does_not_is_restored(base: Any) -> None:
    async def use(engine: VLLMEngine, vllm: Vllm) -> FakeCore:
        await engine.load(adapter(1, layers=("self_attn.o_proj",), norm=True), 1)
        await engine.load(adapter(2), 2)
        return vllm.cores[0]

    core = serve(use, base=base, merge=True)
    assert core.sent == [[O_PROJ, NORM], [*QKV, O_PROJ, NORM]]
    assert torch.equal(core.weights[O_PROJ], base[O_PROJ])
    assert torch.equal(core.weights[NORM], base[NORM])


def test_trained_norms_are_served(base: Any) -> None:
    given = adapter(norm=True)

    async def use(engine: VLLMEngine, vllm: Vllm) -> torch.Tensor:
        await engine.load(given, 1)
        return vllm.cores[0].weights[NORM]

    assert torch.equal(serve(use, base=base, merge=True), given.tensors[f"base_model.model.{NORM}"])


def test_an_adapter_that_can_not_be_merged_is_refused_and_the_core_lives(base: Any) -> None:
    async def use(engine: VLLMEngine, vllm: Vllm) -> None:
        strange = Adapter(
            adapter().config,
            {"base_model.model.conv.lora_A.weight": torch.ones(2, 2)}
            | {"base_model.model.conv.lora_B.weight": torch.ones(2, 2)},
        )
        with pytest.raises(BadConfig, match=r"conv.weight is no weight of the model"):
            await engine.load(strange, 1)
        assert not vllm.cores[0].stopped
        assert engine.version == 0

    serve(use, base=base, merge=True)


# -- requests in flight --


def test_a_load_waits_for_what_is_in_flight_and_lets_nothing_begin_meanwhile(base: Any) -> None:
    async def use(engine: VLLMEngine, vllm: Vllm) -> list[Completion]:
        (core,) = vllm.cores
        core.hold()
        early = asyncio.ensure_future(engine.generate(PROMPT, sampling()))
        await until(lambda: core.requests)
        load = asyncio.ensure_future(engine.load(adapter(), 1))
        await asyncio.sleep(0.01)
        late = asyncio.ensure_future(engine.generate(PROMPT, sampling()))
        await asyncio.sleep(0.01)
        assert not load.done()
        assert not core.sent
        assert len(core.requests) == 1
        core.release()
        await load
        return [await early, await late]

    early, late = serve(use, base=base, merge=True)
    assert early.versions.tolist() == [0] * 4
    assert late.versions.tolist() == [1] * 4


def test_a_swap_that_goes_on_cuts_what_is_in_flight_and_finishes_it_under_the_new_weights(base: Any) -> None:
    async def use(engine: VLLMEngine, vllm: Vllm) -> Completion:
        (core,) = vllm.cores
        core.hold()
        asked = asyncio.ensure_future(engine.generate(PROMPT, sampling(5)))
        await until(lambda: core.requests)
        await engine.load(adapter(), 1)
        core.release()
        return await asked

    said = serve(use, base=base, merge=True, swap="continue")
    assert said.versions.tolist() == [0, 1, 1, 1, 1]


# -- what goes wrong --


@pytest.mark.parametrize("stale", ["a", "none"])
def test_weights_that_are_not_what_was_sent_stop_the_core_and_the_next_one_gets_the_version_before(
    base: Any, monkeypatch: pytest.MonkeyPatch, stale: str
) -> None:
    before = adapter(1)

    async def use(engine: VLLMEngine, vllm: Vllm) -> None:
        await engine.load(before, 3)
        (core,) = vllm.cores

        async def replace(weights: Any) -> None:
            """Keeps what it has, but for one value where that is to be none of the versions."""
            core.weights[QKV[1]][0] += stale == "none"
            for name in weights.shapes:
                weights.make(name)

        monkeypatch.setattr(core, "replace", replace)
        found = (
            "it serves version 3: 1 of the 4"
            if stale == "a"
            else r"none of the versions.*version 3, version 4"
        )
        with pytest.raises(WrongWeights, match=f"given version 4 of the adapter, and.*{found}"):
            await engine.load(adapter(2), 4)
        assert core.stopped
        assert (await engine.generate(PROMPT, sampling())).versions.tolist() == [3] * 4
        torch.testing.assert_close(vllm.cores[1].weights[QKV[0]], merged(base, before, QKV[0]))

    serve(use, base=base, merge=True)


def test_a_core_that_dies_gets_its_weights_again_and_one_that_dies_in_a_load_the_new_ones(base: Any) -> None:
    first, second = adapter(1), adapter(2)

    async def use(engine: VLLMEngine, vllm: Vllm) -> None:
        await engine.load(first, 1)
        vllm.cores[0].die()
        assert (await engine.generate(PROMPT, sampling())).versions.tolist() == [1] * 4
        torch.testing.assert_close(vllm.cores[1].weights[QKV[0]], merged(base, first, QKV[0]))
        vllm.cores[1].dies_at_add = True
        await engine.load(second, 2)
        assert engine.version == 2
        torch.testing.assert_close(vllm.cores[2].weights[QKV[0]], merged(base, second, QKV[0]))
        assert engine.take_figures()["engine/restarts"] == 2

    serve(use, base=base, merge=True)


# -- what a worker reads --


class Model(torch.nn.Module):
    """Query, key and value in one, as vLLM has them, under other names than the checkpoint's."""

    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}

    class hf_to_vllm_mapper:
        @staticmethod
        def get_rename_mapper() -> Any:
            class Mapper:
                @staticmethod
                def map_name(name: str) -> str:
                    return name.replace("model.layers", "language_model.layers")

            return Mapper

    def __init__(self, base: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        attention = torch.nn.Module()
        attention.qkv_proj = torch.nn.Linear(6, 16, bias=False)
        attention.qkv_proj.weight.data = torch.cat([base[name] for name in QKV if "weight" in name])
        layer = torch.nn.Module()
        layer.self_attn, layer.input_layernorm = attention, torch.nn.LayerNorm(6, bias=False)
        layer.input_layernorm.weight.data = base[NORM].clone()
        self.language_model = torch.nn.Module()
        self.language_model.layers = torch.nn.ModuleList([layer])


class Worker(WeightsReader):
    def __init__(self, model: Model) -> None:
        self._model = model

    def get_model(self) -> Model:
        return self._model


def test_a_fused_layer_is_read_block_by_block(base: Any) -> None:
    worker = Worker(Model(base))
    assert worker.agentrl_fused_layers() == Model.packed_modules_mapping
    wanted = {name: SHAPES[name] for name in (QKV[0], QKV[2], QKV[3], NORM)}
    found = worker.agentrl_read_weights(wanted)
    assert found == {name: checksum(base[name]) for name in wanted}
    worker.get_model().language_model.layers[0].self_attn.qkv_proj.weight.data[9, 0] += 1e-3  # the key's
    changed = worker.agentrl_read_weights(wanted)
    assert {name for name in wanted if changed[name] != found[name]} == {QKV[2]}


def test_what_the_model_does_not_have_is_not_read(base: Any) -> None:
    worker = Worker(Model(base))
    assert worker.agentrl_read_weights({"model.layers.7.input_layernorm.weight": (6,)}) == {}


def test_one_changed_value_a_place_a_shape_or_a_dtype_changes_a_checksum(base: Any) -> None:
    values = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    changed = values.clone()
    changed.view(torch.int32)[2, 3] ^= 1
    kinds = [
        values,
        changed,
        values.flip(0),
        values.T,
        values.reshape(4, 3),
        values.bfloat16(),
        values.double(),
    ]
    assert len({checksum(one) for one in kinds}) == len(kinds)
    assert checksum(values.T.contiguous().T) == checksum(values)


def test_a_checksum_sums_parts_of_a_large_tensor_at_their_places(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    whole = checksum(values)
    monkeypatch.setattr("agentrl.engines.vllm_worker._PART", 7)
    assert checksum(values) == whole


# -- settings --


def test_vllm_is_started_for_weights_instead_of_adapters() -> None:
    arguments = engine_arguments(make_settings(merge=True), known=(), on_cpu=False)
    assert arguments["weight_transfer_config"] == {"backend": "ipc"}
    assert "enable_lora" not in arguments
    with pytest.raises(BadConfig, match=r"engine\.merge is true, and this vLLM runs on a CPU"):
        engine_arguments(make_settings(merge=True), known=(), on_cpu=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"args": {"quantization": "fp8"}}, "engine.args.quantization is 'fp8'; it must be None"),
        ({"args": {"pipeline_parallel_size": 2}}, "pipeline_parallel_size is 2; it must be 1"),
        ({"args": {"tensor_parallel_size": 2}}, "tensor_parallel_size is 2; it must be 1 to train"),
        ({"args": {"weight_transfer_config": {}}}, "can't be set: set engine.merge"),
        ({"lora_modules": ("q_proj", "lm_head")}, "names lm_head"),
    ],
)
def test_what_does_not_go_with_merged_weights_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BadConfig, match=message):
        make_settings(merge=True, **changes)


def test_any_rank_may_be_merged() -> None:
    assert make_settings(merge=True, max_lora_rank=600).merge


def test_handles_of_memory_reach_vllms_worker_as_they_were() -> None:
    class Worker(WeightsReader):
        def update_weights(self, update_info: dict[str, Any]) -> None:
            self.got = update_info

    handles = {"GPU-1": (0, (2, 3), b"\0\1", torch.bfloat16)}
    worker = Worker()
    worker.agentrl_update_weights({"names": ["w"]}, pickle.dumps(handles))
    assert worker.got == {"names": ["w"], "ipc_handles": handles}


def test_an_evaluation_has_nothing_to_merge_with() -> None:
    served = Served(
        base="somewhere", model=None, tokenizer=None, limits=RolloutConfig(), max_lora_rank=4, training=False
    )
    with pytest.raises(BadConfig, match="engine.merge is true; it is for training"):
        asyncio.run(open_engine(EngineConfig(kind="vllm", merge=True), served))


@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_vllm_without_weight_updates_is_refused() -> None:
    with pytest.raises(BadConfig, match=r"no weight transfer.*start_weight_update.*install vLLM 0\.32"):
        check_transfer(object)
