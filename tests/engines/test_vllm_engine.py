"""The engine over vLLM without vLLM, with adapters; merged weights are in test_vllm_merged.py."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_vllm import PROMPT, Vllm, make_settings, sampling, serve, until

from agentrl.engine import Adapter
from agentrl.engines import vllm_settings
from agentrl.engines.vllm import VLLMEngine
from agentrl.engines.vllm_adapters import AdapterShelf
from agentrl.engines.vllm_core import PublishedAdapter
from agentrl.engines.vllm_settings import engine_arguments, environment
from agentrl.engines.vllm_versions import Ledger
from agentrl.engines.vllm_worker import HOME_VARIABLE, OWNER_VARIABLE, WeightsReader, digest
from agentrl.errors import BadConfig, EngineError, UserError, WrongWeights
from agentrl.types import Completion


def adapter(seed: int = 0, **config: Any) -> Adapter:
    """Two layers of rank 2 with alpha 6: B is served times 3."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"base_model.model.{layer}.lora_{side}.weight": torch.randn(shape, generator=generator)
        for layer in ("model.q_proj", "model.o_proj")
        for side, shape in (("A", (2, 6)), ("B", (5, 2)))
    }
    return Adapter({"r": 2, "lora_alpha": 6, **config}, tensors)


# -- adapters --


def test_every_load_has_a_name_and_a_folder_of_its_own_and_the_old_one_goes() -> None:
    async def use(engine: VLLMEngine, vllm: Vllm) -> list[str]:
        names = []
        for _ in range(3):
            await engine.load(adapter(), 1)
            names += vllm.cores[0].loaded
            assert [folder.name for folder in engine._versions.home.iterdir()] == names[-1:]
        await engine.load(None, 2)
        assert not vllm.cores[0].loaded
        assert engine.version == 2
        return names

    assert len(set(serve(use))) == 3


def test_an_old_adapter_stays_until_its_requests_are_done_and_a_third_waits_for_it() -> None:
    async def use(engine: VLLMEngine, vllm: Vllm) -> list[int]:
        (core,) = vllm.cores
        core.hold()
        await engine.load(adapter(1), 1)
        early = asyncio.ensure_future(engine.generate(PROMPT, sampling()))
        await until(lambda: core.requests)
        await engine.load(adapter(2), 2)
        third = asyncio.ensure_future(engine.load(adapter(3), 3))
        await asyncio.sleep(0.01)
        assert not third.done()
        assert len(core.loaded) == 2
        core.release()
        await third
        return (await early).versions.tolist()

    assert serve(use) == [1] * 4


def test_a_swap_that_goes_on_sends_what_was_said_along_with_a_seed_of_its_own() -> None:
    async def use(engine: VLLMEngine, vllm: Vllm) -> tuple[Completion, list[Any]]:
        (core,) = vllm.cores
        core.hold()
        await engine.load(adapter(1), 1)
        asked = asyncio.ensure_future(engine.generate(PROMPT, sampling(5, seed=9)))
        await until(lambda: core.requests)
        await engine.load(adapter(2), 2)
        core.release()
        return await asked, core.requests

    said, (first, second) = serve(use, swap="continue")
    assert said.token_ids.tolist() == [7] * 5
    assert said.versions.tolist() == [1, 2, 2, 2, 2]
    assert said.finish == "length"
    assert second[0] == [*PROMPT.tolist(), 7]
    assert (first[1].max_tokens, second[1].max_tokens) == (5, 4)
    assert first[1].seed == 9 != second[1].seed
    assert first[2] != second[2]


def test_a_wrong_adapter_is_named_by_its_version_and_the_one_before_is_served_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def use(engine: VLLMEngine, vllm: Vllm) -> None:
        (core,) = vllm.cores
        core.hold()
        await engine.load(adapter(1), 3)
        asked = asyncio.ensure_future(engine.generate(PROMPT, sampling(5)))
        await until(lambda: core.requests)
        read = core.read_back

        async def stale(published: PublishedAdapter) -> dict[str, str]:
            core.loaded[published.name] = adapter(1)
            return await read(published)

        monkeypatch.setattr(core, "read_back", stale)
        with pytest.raises(WrongWeights, match="given version 4 of the adapter, and it serves version 3"):
            await engine.load(adapter(2), 4)
        core.release()
        assert (await asked).versions.tolist() == [3] * 5  # the pause was undone
        assert len(core.loaded) == 1
        assert engine.version == 3

    serve(use, swap="continue")


def test_an_engine_that_forgot_the_adapter_is_said_to_serve_the_bare_base() -> None:
    ledger = Ledger()
    ledger.enter({}, "the bare base")
    with pytest.raises(
        WrongWeights, match="given version 1, and it serves the bare base: 1 of the 1 matrices"
    ):
        ledger.prove("version 1", {"q_proj.A": "0"}, {})


def test_one_changed_bit_in_one_matrix_is_found() -> None:
    shelf, ledger = AdapterShelf(max_rank=4), Ledger()
    changed = adapter()
    next(iter(changed.tensors.values())).view(torch.int32)[0, 0] ^= 1
    published, other = (shelf.publish(one, 1, dtype=torch.float32).digests for one in (adapter(), changed))
    ledger.enter(other, "version 2")
    with pytest.raises(WrongWeights, match="it serves version 2: 1 of the 4 matrices"):
        ledger.prove("version 1", published, other)
    shelf.close()


def test_an_adapter_that_vllm_can_not_serve_is_refused_by_its_key() -> None:
    async def use(engine: VLLMEngine, vllm: Vllm) -> None:
        with pytest.raises(BadConfig, match="lora.train_norms"):
            await engine.load(adapter(modules_to_save=["norm"]), 1)
        with pytest.raises(BadConfig, match="rank is 8, and the vLLM engine was started for a rank of 4"):
            await engine.load(adapter(rank_pattern={"o_proj": 8}), 1)
        whole = Adapter(adapter().config, {"base_model.model.norm.weight": torch.ones(3)})
        with pytest.raises(BadConfig, match="no LoRA matrix"):
            await engine.load(whole, 1)

    serve(use)


def test_an_engine_started_for_the_bare_base_takes_no_adapter() -> None:
    async def use(engine: VLLMEngine, vllm: Vllm) -> None:
        with pytest.raises(BadConfig, match="started for the bare base"):
            await engine.load(adapter(), 1)

    serve(use, max_lora_rank=None)


# -- what a worker reads back --


def test_padding_does_not_change_a_digest_and_a_value_a_place_or_a_dtype_does() -> None:
    matrix = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    padded = torch.zeros(4, 6)
    padded[:2, :2] = matrix
    assert digest(padded) == digest(matrix)
    assert len({digest(matrix), digest(matrix * 2), digest(matrix.flip(0)), digest(matrix.bfloat16())}) == 4
    assert digest(torch.zeros(2, 2)) == digest(torch.zeros(0, 0))


def test_a_worker_without_the_adapter_reads_nothing_back() -> None:
    class Manager:
        lora_index_to_id = (None, 4)

    class Worker(WeightsReader):
        class model_runner:
            class lora_manager:
                _adapter_manager = Manager()

    assert Worker().agentrl_read_adapter(5, []) == {}


# -- a core that dies --


def test_what_is_in_flight_fails_and_the_next_request_starts_the_core_once_with_the_adapter() -> None:
    async def use(engine: VLLMEngine, vllm: Vllm) -> list[Any]:
        await engine.load(adapter(), 6)
        vllm.cores[0].hold()
        asked = [asyncio.ensure_future(engine.generate(PROMPT, sampling())) for _ in range(3)]
        await until(lambda: len(vllm.cores[0].requests) == 3)
        vllm.cores[0].die()
        ends = await asyncio.gather(*asked, return_exceptions=True)
        assert all(isinstance(end, EngineError) for end in ends)
        again = await asyncio.gather(*(engine.generate(PROMPT, sampling()) for _ in range(3)))
        assert len(vllm.cores) == 2
        assert vllm.cores[0].stopped
        assert [asked[2] for asked in vllm.cores[1].requests] == list(vllm.cores[1].loaded) * 3
        assert vllm.notes == ["vLLM's core died and is started again, with version 6"]
        figures = engine.take_figures()
        assert figures["engine/restarts"] == 1
        assert engine.take_figures()["engine/restarts"] == 0
        return [completion.versions.tolist() for completion in again]

    assert serve(use) == [[6] * 4] * 3


def test_a_core_that_dies_during_a_load_is_started_and_loaded_again() -> None:
    async def use(engine: VLLMEngine, vllm: Vllm) -> None:
        await engine.load(adapter(1), 1)
        vllm.cores[0].dies_at_add = True
        await engine.load(adapter(2), 2)
        assert engine.version == 2
        assert len(vllm.cores) == 2
        assert len(vllm.cores[1].loaded) == 1

    serve(use)


def test_a_core_that_dies_over_and_over_ends_the_run() -> None:
    async def use(engine: VLLMEngine, vllm: Vllm) -> None:
        for _ in range(4):
            vllm.cores[-1].die()
            await engine.score(PROMPT, 1.0)
        assert len(vllm.cores) == 5  # an answer between two deaths, and they are no series
        vllm.cores[-1].die()
        vllm.fails = 9
        with pytest.raises(UserError, match="died 5 times without an answer"):
            await engine.generate(PROMPT, sampling())
        assert vllm.fails == 5

    serve(use)


def test_a_core_that_does_not_start_is_the_users_matter() -> None:
    async def main() -> None:
        with pytest.raises(UserError, match="no memory"):
            await VLLMEngine.start_with(make_settings(), start_core=Vllm(fails=1), on_note=print)

    asyncio.run(main())


# -- the engine's ends --


def test_closing_fails_what_is_in_flight_and_may_be_done_twice() -> None:
    async def use(engine: VLLMEngine, vllm: Vllm) -> None:
        vllm.cores[0].hold()
        asked = asyncio.ensure_future(engine.generate(PROMPT, sampling()))
        await until(lambda: vllm.cores[0].requests)
        await engine.close()
        with pytest.raises(EngineError, match="was closed"):
            await asked
        with pytest.raises(EngineError, match="is closed"):
            await engine.generate(PROMPT, sampling())

    serve(use)


def test_requests_wait_while_the_engine_sleeps() -> None:
    async def use(engine: VLLMEngine, vllm: Vllm) -> Completion:
        (core,) = vllm.cores
        core.hold()
        asked = asyncio.ensure_future(engine.generate(PROMPT, sampling()))
        await until(lambda: core.requests)
        await engine.sleep()
        core.release()
        await asyncio.sleep(0.01)
        assert len(core.requests) == 1
        assert not asked.done()
        await engine.wake()
        return await asked

    assert len(serve(use).token_ids) == 4


@pytest.mark.parametrize("dies_in_its_sleep", [False, True])
def test_a_core_that_dies_of_sleeping_or_waking_is_replaced(dies_in_its_sleep: bool) -> None:
    async def use(engine: VLLMEngine, vllm: Vllm) -> int:
        if dies_in_its_sleep:
            await engine.sleep()
        vllm.cores[0].dies_at_sleep = True
        if not dies_in_its_sleep:
            await engine.sleep()
        await engine.wake()
        await engine.generate(PROMPT, sampling())
        return len(vllm.cores)

    assert serve(use) == 2


def test_prompt_tokens_that_the_cache_had_are_counted_apart() -> None:
    async def use(engine: VLLMEngine, vllm: Vllm) -> dict[str, float]:
        await engine.generate(PROMPT, sampling())
        return engine.take_figures()

    figures = serve(use)
    assert figures["rollout/prefill_tokens"] == 5
    assert figures["rollout/reused_tokens"] == 3
    assert figures["rollout/decode_tokens"] == 3


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([], "empty"), (range(61), "context of 64"), ([100], "embeds 0 to 99"), ([-1], "from -1")],
)
def test_a_prompt_that_can_not_be_served_is_refused(prompt: Any, message: str) -> None:
    async def use(engine: VLLMEngine, vllm: Vllm) -> None:
        with pytest.raises(UserError, match=message):
            await engine.generate(np.array(prompt, np.int32), sampling())

    serve(use)


# -- settings --


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("max_num_seqs", "engine.max_sequences"),
        ("max_model_len", "rollout.max_episode_tokens"),
        ("dtype", "model.dtype"),
    ],
)
def test_an_argument_that_agentrl_sets_is_refused_with_the_key_that_sets_it(name: str, advice: str) -> None:
    with pytest.raises(BadConfig, match=f"engine.args.{name} can't be set: set {advice}"):
        make_settings(args={name: 1})


def test_an_unknown_argument_is_refused_with_what_is_meant() -> None:
    with pytest.raises(BadConfig, match="did you mean 'gpu_memory_utilization'"):
        engine_arguments(
            make_settings(args={"gpu_memory_utilisation": 0.5}),
            known=["gpu_memory_utilization"],
            on_cpu=False,
        )


def test_ranks_are_rounded_up_to_what_vllm_has_and_the_users_arguments_pass_through() -> None:
    arguments = engine_arguments(
        make_settings(max_lora_rank=9, args={"block_size": 64}), known=["block_size"], on_cpu=True
    )
    assert (arguments["max_lora_rank"], arguments["block_size"]) == (16, 64)
    assert arguments["logprobs_mode"] == "processed_logprobs"


@pytest.mark.parametrize(
    ("cores", "args", "variable", "one"),
    [
        (2, {}, None, True),
        (8, {"tensor_parallel_size": 1}, None, True),
        (9, {}, None, False),
        (2, {"tensor_parallel_size": 2}, None, False),
        (2, {}, "VLLM_CPU_OMP_THREADS_BIND", False),
        (2, {}, "VLLM_CPU_NUM_OF_RESERVED_CPU", False),
    ],
)
def test_on_few_cores_of_a_cpu_vllms_core_and_its_worker_are_one_process(
    monkeypatch: pytest.MonkeyPatch, cores: int, args: dict[str, Any], variable: str | None, one: bool
) -> None:
    monkeypatch.setattr(vllm_settings, "usable_cores", lambda: cores)
    for name in vllm_settings._BINDING:
        monkeypatch.delenv(name, raising=False)
    if variable is not None:
        monkeypatch.setenv(variable, "0")
    settings = make_settings(max_lora_rank=None, args=args)
    arguments = engine_arguments(settings, known=args, on_cpu=True)
    assert ("distributed_executor_backend" in arguments) is one
    assert "distributed_executor_backend" not in engine_arguments(settings, known=args, on_cpu=False)


def test_no_prompt_comes_in_parts_on_a_cpu_where_vllm_would_die_of_it() -> None:
    parts = {"enable_chunked_prefill": True}
    for on_cpu in (True, False):
        arguments = engine_arguments(make_settings(), known=parts, on_cpu=on_cpu)
        assert arguments.get("enable_chunked_prefill") is (False if on_cpu else None)
    assert engine_arguments(make_settings(args=parts), known=parts, on_cpu=False)["enable_chunked_prefill"]
    with pytest.raises(BadConfig, match=r"engine\.args\.enable_chunked_prefill is true"):
        engine_arguments(make_settings(args=parts), known=parts, on_cpu=True)


def test_the_users_executor_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_settings, "usable_cores", lambda: 2)
    args = {"distributed_executor_backend": "mp"}
    arguments = engine_arguments(make_settings(args=args), known=args, on_cpu=True)
    assert arguments["distributed_executor_backend"] == "mp"


def test_vllm_may_sleep_where_it_shares_a_gpu_and_nowhere_else() -> None:
    for sleeps in (False, True):
        arguments = engine_arguments(make_settings(sleeps=sleeps), known=(), on_cpu=False)
        assert arguments["enable_sleep_mode"] is sleeps
    with pytest.raises(BadConfig, match=r"engine\.share_gpu is true, and this vLLM runs on a CPU"):
        engine_arguments(make_settings(sleeps=True), known=(), on_cpu=True)


def test_only_the_adapted_layers_are_wrapped_and_never_the_head() -> None:
    arguments = engine_arguments(make_settings(lora_modules=("q_proj", "down_proj")), known=(), on_cpu=True)
    assert arguments["lora_target_modules"] == ["q_proj", "down_proj"]
    with pytest.raises(BadConfig, match="names lm_head"):
        make_settings(lora_modules=("q_proj", "lm_head"))


def test_adapters_are_not_served_by_parts_and_not_beyond_vllms_ranks() -> None:
    with pytest.raises(BadConfig, match="tensor_parallel_size is 2; it must be 1 to train"):
        make_settings(args={"tensor_parallel_size": 2})
    with pytest.raises(BadConfig, match="at most 512"):
        make_settings(max_lora_rank=600)
    assert make_settings(max_lora_rank=None, args={"tensor_parallel_size": 2}).args


def test_the_environment_is_as_before_and_what_the_user_set_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    before = dict(os.environ)
    with environment(tmp_path):
        assert os.environ["VLLM_LOGGING_LEVEL"] == "DEBUG"
        assert os.environ["VLLM_NO_USAGE_STATS"] == "1"
        os.environ["LD_PRELOAD"] = "for its children"
    assert dict(os.environ) == before


@pytest.mark.parametrize(("ours", "theirs"), [("", "1,3"), ("4,5,6,GPU-8f6a", "5,GPU-8f6a")])
def test_its_processes_see_the_gpus_that_it_is_given(
    ours: str, theirs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ours)
    with environment(tmp_path, gpus=(1, 3)):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == theirs
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ours
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    with pytest.raises(BadConfig, match=r"engine.gpus is \[1, 3\], .* count from 0 to 1"):
        environment(tmp_path, gpus=(1, 3)).__enter__()


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs Linux' pidfd_open")
def test_workers_end_with_the_process_that_started_vllm_and_its_folder_is_removed(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    worker = "import agentrl.engines.vllm_worker, os, time; print(os.getpid(), flush=True); time.sleep(600)"
    core = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {worker!r}])"
    owner = (
        "import os, subprocess, sys;"
        f"os.environ.update({{{OWNER_VARIABLE!r}: str(os.getpid()), {HOME_VARIABLE!r}: {str(home)!r}}});"
        f"core = subprocess.Popen([sys.executable, '-c', {core!r}]);"
        "print(core.pid, flush=True); core.wait()"
    )
    with subprocess.Popen([sys.executable, "-c", owner], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pids = [int(process.stdout.readline()) for _ in range(2)]
        descriptors = [os.pidfd_open(pid) for pid in pids]
        process.send_signal(signal.SIGKILL)
        process.stdout.read()  # ends when the last process that could write to it has ended
    assert not home.exists()
    for descriptor in descriptors:
        os.close(descriptor)
