"""One AsyncLLM and its child processes, from start to end: the only module that calls vLLM's engine.

Every call ends: where the core is gone, what waits for it fails with CoreDied, also the calls that vLLM
itself would leave waiting. Ctrl-C does not reach the children: the run decides when they end. They end with
this process, however it ends (see ``agentrl.engines.vllm_worker``).
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import signal
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from agentrl.engine import Sampling
from agentrl.engines.vllm_settings import (
    VLLMSettings,
    check_temperature,
    engine_arguments,
    environment,
    no_vllm,
)
from agentrl.engines.vllm_transfer import Weights, check_transfer, send
from agentrl.errors import BadConfig, EngineError, UserError
from agentrl.threads import in_compute_thread, in_thread
from agentrl.types import Finish

T = TypeVar("T")

__all__ = ["Core", "CoreDied", "PublishedAdapter", "Sampled", "VLLMCore"]

_GLANCE_S = 0.5  # between looks at whether the core that is waited for still lives
_ANSWER_S = 1800.0  # for what is no request: then the core hangs, and counts as dead
_FAREWELL_S = 10.0  # for a process that was killed to be gone
_FINISHES: Mapping[str | None, Finish] = {"stop": "stop", "length": "length", "abort": "aborted"}


class CoreDied(EngineError):
    """vLLM's core is gone, with everything that was in flight."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """What vLLM said to one request."""

    token_ids: list[int]  # (C,)
    logprobs: list[float]  # (C,) nats
    finish: Finish
    prompt_tokens: int
    cached_tokens: int  # of the prompt, that its prefix cache had


@dataclass(frozen=True, slots=True)
class PublishedAdapter:
    """An adapter as vLLM is told of it."""

    name: str
    number: int  # vLLM's id
    version: int
    folder: Path
    modules: tuple[str, ...]  # that it adapts, by PEFT's names
    digests: Mapping[str, str]  # of every matrix that is not zero, by "module.A" and "module.B"


class Core(Protocol):
    """What the engine needs of vLLM."""

    vocabulary: int  # token ids that the model embeds
    dtype: torch.dtype  # that it serves adapters and weights in

    @property
    def dead(self) -> bool: ...

    async def sample(
        self, token_ids: list[int], sampling: Sampling, *, adapter: PublishedAdapter | None
    ) -> Sampled: ...

    async def score(self, token_ids: list[int], *, adapter: PublishedAdapter | None) -> list[float]: ...

    async def add(self, adapter: PublishedAdapter) -> None: ...

    async def remove(self, adapter: PublishedAdapter) -> None: ...

    async def read_back(self, adapter: PublishedAdapter) -> dict[str, str]: ...

    async def fused_layers(self) -> Mapping[str, Sequence[str]]: ...

    async def replace(self, weights: Weights) -> None: ...

    async def read_weights(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]: ...

    async def pause(self) -> None: ...

    async def resume(self) -> None: ...

    async def sleep(self) -> None: ...

    async def wake(self) -> None: ...

    async def stop(self) -> None: ...


class VLLMCore:
    """A :class:`Core` over AsyncLLM, for one event loop."""

    def __init__(self, llm: Any) -> None:
        self._running: Any = llm  # None: stopped
        config = llm.vllm_config
        self.vocabulary = int(config.model_config.get_vocab_size())
        lora = config.lora_config
        self.dtype: torch.dtype = config.model_config.dtype if lora is None else lora.lora_dtype
        self._requests = itertools.count()
        self._hangs = False

    @classmethod
    async def start(cls, settings: VLLMSettings, *, home: Path) -> VLLMCore:
        """Load the model, which takes from seconds to minutes, in a thread.

        Raises MissingExtra without vLLM, BadConfig for what vLLM refuses, EngineError where its core does not
        start.
        """
        starting = asyncio.ensure_future(in_thread(_start, settings, home))
        try:
            core = cls(await asyncio.shield(starting))
        except asyncio.CancelledError:
            starting.add_done_callback(_stop_unwanted)
            raise
        try:
            await core._ask(core._llm.get_supported_tasks())  # the first request need not wait for it
        except BaseException:
            await core.stop()
            raise
        return core

    @property
    def dead(self) -> bool:
        """Whether it will never answer again."""
        return self._running is None or self._hangs or bool(self._running.errored)

    async def sample(
        self, token_ids: list[int], sampling: Sampling, *, adapter: PublishedAdapter | None
    ) -> Sampled:
        """One completion; cancelling the wait aborts the request. Raises CoreDied, EngineError, UserError."""
        output = await self._request(token_ids, _sampling_params(sampling), adapter)
        (said,) = output.outputs
        logprobs = [] if said.logprobs is None else list(said.logprobs.logprobs)
        ids = list(said.token_ids)
        if len(ids) != len(logprobs):
            raise EngineError(
                f"vLLM returned {len(ids)} tokens with {len(logprobs)} logprobs; each should have one"
            )
        cached = output.num_cached_tokens or 0
        return Sampled(ids, logprobs, _FINISHES[said.finish_reason], len(token_ids), cached)

    async def score(self, token_ids: list[int], *, adapter: PublishedAdapter | None) -> list[float]:
        """Logprobs (T,) in nats of ``token_ids`` (T,) at temperature 1; the first: 0."""
        params = _sampling_params(Sampling(max_tokens=1, seed=0, temperature=0.0), prompt_logprobs=0)
        output = await self._request(token_ids, params, adapter)
        rows = output.prompt_logprobs
        return [0.0, *(rows[place][token_ids[place]].logprob for place in range(1, len(token_ids)))]

    async def add(self, adapter: PublishedAdapter) -> None:
        """Have the worker load ``adapter``. Raises BadConfig where vLLM refuses it, CoreDied."""
        with _refusing(f"version {adapter.version} of the adapter"):
            await self._ask(self._llm.add_lora(_lora_request(adapter)))

    async def remove(self, adapter: PublishedAdapter) -> None:
        """Have the worker forget ``adapter``."""
        await self._ask(self._llm.remove_lora(adapter.number))

    async def read_back(self, adapter: PublishedAdapter) -> dict[str, str]:
        """Digests of what the workers' kernels read for ``adapter``; see ``vllm_worker``."""
        args = (adapter.number, list(adapter.modules))
        found = await self._ask(self._llm.collective_rpc("agentrl_read_adapter", args=args))
        return {name: value for worker in found for name, value in worker.items()}

    async def fused_layers(self) -> Mapping[str, Sequence[str]]:
        """The layers that vLLM has as one, by the last part of that one's name, in its order."""
        (fused, *_) = await self._ask(self._llm.collective_rpc("agentrl_fused_layers"))
        return dict(fused)

    async def replace(self, weights: Weights) -> None:
        """Put ``weights`` in the place of the model's, and forget the keys and values of those; nothing may
        be in flight. Raises BadConfig where vLLM refuses them, CoreDied; it then holds a mixture."""
        loop = asyncio.get_running_loop()

        def ask(call: Coroutine[Any, Any, Any]) -> Any:
            return asyncio.run_coroutine_threadsafe(self._ask(call), loop).result()

        with _refusing("the merged weights"):
            await in_compute_thread(send, self._llm, weights, ask=ask)
        if not await self._ask(self._llm.reset_prefix_cache(reset_connector=True)):
            raise CoreDied("vLLM did not forget the keys and values of the weights before, and is given up")

    async def read_weights(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
        """Checksums of what the workers' kernels read for these tensors; see ``vllm_worker``."""
        found = await self._ask(self._llm.collective_rpc("agentrl_read_weights", args=(dict(shapes),)))
        return {name: value for worker in found for name, value in worker.items()}

    async def pause(self) -> None:
        """End all requests in flight, with what they have said; nothing new begins until :meth:`resume`."""
        await self._ask(self._llm.pause_generation(mode="abort", clear_cache=False))

    async def resume(self) -> None:
        """Begin with what has come since :meth:`pause`."""
        await self._ask(self._llm.resume_generation())

    async def sleep(self) -> None:
        """Move the weights to the host's memory and drop keys and values."""
        await self._ask(self._llm.sleep(level=1))

    async def wake(self) -> None:
        """Undo :meth:`sleep`."""
        await self._ask(self._llm.wake_up())

    async def stop(self) -> None:
        """End the children and wait for them; what is in flight is nobody's any more."""
        llm, self._running = self._running, None  # else vLLM complains when the interpreter ends
        if llm is not None:
            await in_thread(_shut_down, llm)
            # By now vLLM has closed its sockets on this loop; their context it would leave to the collector.
            ended = asyncio.ensure_future(in_thread(llm.engine_core.resources.ctx.term))
            await asyncio.wait({ended}, timeout=_FAREWELL_S)

    @property
    def _llm(self) -> Any:
        if self._running is None:
            raise _died()
        return self._running

    async def _request(self, token_ids: list[int], params: Any, adapter: PublishedAdapter | None) -> Any:
        """The last output of one request."""
        from vllm.inputs.engine import tokens_input
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        outputs = self._llm.generate(
            tokens_input(token_ids),
            params,
            str(next(self._requests)),
            lora_request=None if adapter is None else _lora_request(adapter),
        )
        try:
            return [output async for output in outputs][-1]
        except EngineDeadError as error:
            raise _died() from error
        except EngineGenerateError as error:
            raise EngineError(f"vLLM failed in a request: {error.__cause__ or error}") from error
        except ValueError as error:
            raise UserError(f"vLLM refused a request: {error}; correct what it names") from error

    async def _ask(self, call: Coroutine[Any, Any, T]) -> T:
        """What ``call`` to the core returns. vLLM leaves such calls waiting for ever when the core dies."""
        from vllm.v1.engine.exceptions import EngineDeadError

        task = asyncio.ensure_future(call)
        until = asyncio.get_running_loop().time() + _ANSWER_S
        try:
            while not task.done():
                await asyncio.wait({task}, timeout=_GLANCE_S)
                self._hangs |= asyncio.get_running_loop().time() > until and not task.done()
                if self.dead and not task.done():
                    raise _died()
            return task.result()
        except EngineDeadError as error:
            raise _died() from error
        finally:
            task.cancel()


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Raises BadConfig for what is raised in the core, which comes as a bare Exception with its message."""
    try:
        yield
    except Exception as error:
        if type(error) is not Exception:
            raise
        raise BadConfig(
            f"vLLM refused {what}: {error}. Change the settings in lora that it names, or set engine.kind to "
            "embedded"
        ) from error


def _died() -> CoreDied:
    return CoreDied("vLLM's core process ended; what it was working on is lost")


def _stop_unwanted(starting: asyncio.Future[Any]) -> None:
    """End a core that was given up while it started."""
    if not starting.cancelled() and starting.exception() is None:
        _shut_down(starting.result())


def _shut_down(llm: Any) -> None:
    """End vLLM's processes, and take leave of them: those that it has to kill it leaves behind as zombies."""
    processes = getattr(llm.engine_core.resources.engine_manager, "processes", ())
    llm.shutdown()
    for process in processes:
        process.join(_FAREWELL_S)


def _start(settings: VLLMSettings, home: Path) -> Any:
    """An AsyncLLM with its processes running."""
    with environment(home, gpus=settings.gpus), _children_ignore_interrupts():
        try:
            from vllm.engine.arg_utils import AsyncEngineArgs
            from vllm.platforms import current_platform
            from vllm.v1.engine.async_llm import AsyncLLM
        except ImportError as error:
            raise no_vllm(str(error)) from error
        if settings.merge:
            check_transfer(AsyncLLM)
        known = (field.name for field in dataclasses.fields(AsyncEngineArgs))
        arguments = engine_arguments(settings, known=known, on_cpu=current_platform.is_cpu())
        try:
            return AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
        except (ValueError, TypeError, NotImplementedError) as error:
            said = " ".join(str(error).split())
            raise BadConfig(
                f"vLLM refused the engine's settings: {said}; correct what it names in engine"
            ) from error
        except RuntimeError as error:
            raise EngineError(
                f"vLLM's core did not start: {error}. What it printed above says why; less memory is needed "
                "with a lower engine.args.gpu_memory_utilization or rollout.max_episode_tokens"
            ) from error


@contextmanager
def _children_ignore_interrupts() -> Iterator[None]:
    """Block SIGINT in this thread: processes that it starts inherit that, and a Ctrl-C in the terminal, which
    reaches all of a program's processes, then ends none of them before the run has ended its step."""
    resource_tracker.ensure_running()  # starting it later would unblock the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _sampling_params(sampling: Sampling, **more: Any) -> Any:
    """vLLM's SamplingParams: everything that changes the distribution is said, and the stop tokens given are
    all that ends a completion."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    check_temperature(sampling.temperature)
    return SamplingParams(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        # Where vLLM keeps seeds in an int64 the 64th bit has no place.
        seed=sampling.seed & (1 << 63) - 1,
        stop_token_ids=list(sampling.stop_token_ids),
        ignore_eos=True,
        logprobs=0,
        flat_logprobs=not more,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        skip_clone=True,
        **more,
    )


def _lora_request(adapter: PublishedAdapter) -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest(adapter.name, adapter.number, str(adapter.folder))
