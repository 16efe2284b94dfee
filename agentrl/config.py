"""What a run may be configured with: strict, frozen records and the one place where each default is written.

Unknown keys, wrong types, values out of range and settings without effect in the chosen mode are refused.
Files and overrides become these records in ``agentrl.configfile``. Stages never see them: they take values.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticSerializationError

from agentrl.errors import BadConfig

__all__ = [
    "AlgorithmConfig",
    "BatchConfig",
    "CheckpointConfig",
    "EngineConfig",
    "EnvironmentConfig",
    "EvaluationConfig",
    "LogConfig",
    "LoraConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RolloutConfig",
    "RunConfig",
    "TinyConfig",
    "WarmStartConfig",
    "dump_config",
]

Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
AtLeastOne = Annotated[float, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Nucleus = Annotated[float, Field(gt=0, le=1)]
Text = Annotated[str, Field(min_length=1)]
# YAML knows lists only; strict applies to what is in them.
Names = Annotated[tuple[Text, ...], Field(strict=False)]
Counts = Annotated[tuple[Count, ...], Field(strict=False, min_length=1)]
Places = Annotated[tuple[CountOrZero, ...], Field(strict=False, min_length=1)]
Betas = Annotated[tuple[BelowOne, BelowOne], Field(strict=False)]


class _Section(BaseModel):
    """Strict and frozen; a key that is not a field is refused."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)

    def idle(self) -> Iterator[tuple[str, str]]:
        """The fields that have no effect with the values of the others, each with the reason."""
        yield from ()

    @model_validator(mode="after")
    def _refuses_idle_settings(self) -> _Section:
        for name, reason in self.idle():
            if name in self.model_fields_set:
                raise ValueError(f"{name} has no effect {reason}: remove it")
        return self


class EnvironmentConfig(_Section):
    """What is trained on and where it is measured."""

    id: Text  # a registered name, or "package.module:Name"
    args: dict[str, Any] = {}  # keyword arguments of the environment
    train: Text = "train"  # split that tasks are drawn from
    held_out: Text = "test"  # split that is evaluated on, disjoint from it

    @model_validator(mode="after")
    def _splits_differ(self) -> EnvironmentConfig:
        if self.train == self.held_out:
            raise ValueError(f"held_out is {self.held_out!r}, as train is; they must be two disjoint splits")
        return self


class TinyConfig(_Section):
    """A small Qwen3-architecture model, its tokenizer trained on the environment's text; made on the spot."""

    hidden_size: Count = 128  # width of the residual stream
    layers: Count = 4
    heads: Count = 4  # attention heads
    kv_heads: Count = 2  # heads of keys and values; divides `heads`
    intermediate_size: Count = 384  # width inside the MLP
    vocab_size: Annotated[int, Field(ge=300)] = 512  # tokens: 256 bytes, the special ones, then merges
    texts: Count = 2000  # gold episodes that the tokenizer is trained on

    @model_validator(mode="after")
    def _heads_divide(self) -> TinyConfig:
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads is {self.kv_heads}; it must divide heads, {self.heads}")
        if self.hidden_size % (2 * self.heads):
            raise ValueError(
                f"hidden_size is {self.hidden_size}; it must be a multiple of 2 x heads, {2 * self.heads}"
            )
        return self


class ModelConfig(_Section):
    """The base model: exactly one of `path` and `tiny`."""

    path: Text | None = None  # a folder, or an id on the Hugging Face hub
    tiny: TinyConfig | None = None  # {}: a tiny model of the default size
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the frozen base; auto: as the checkpoint says
    parser: Text | None = None  # tool-call format, hermes or vllm:NAME; null: the one of the chat template
    history: Literal["append", "template"] = (
        "append"  # template: re-render at user turns, begin a new sample there
    )

    @model_validator(mode="after")
    def _is_one_model(self) -> ModelConfig:
        if (self.path is None) == (self.tiny is None):
            found = "missing" if self.path is None else "set"
            raise ValueError(f"path and tiny are both {found}; it must be one of them, or pass --model M")
        return self


class LoraConfig(_Section):
    """The adapter that is trained."""

    r: Count = 16  # rank
    alpha: Positive = 32  # scale; the update is multiplied by alpha / r
    dropout: BelowOne = 0.0  # probability, in the learner only
    target_modules: Literal["all-linear"] | Names = "all-linear"  # module names that get an adapter
    train_norms: bool = False  # also train the norms' weights


class WarmStartConfig(_Section):
    """Supervised fine-tuning on gold episodes before the first rollout; its result is base and reference."""

    episodes: Count  # distinct gold episodes
    steps: Count  # optimizer steps, at most
    episodes_per_step: Count = 32
    learning_rate: Positive = 1e-3  # peak
    probe_every: CountOrZero = 0  # steps between probes of pass@1; 0: never
    probe_tasks: Count = 64  # tasks a probe
    until: Nucleus | None = None  # pass@1 of a probe at which it stops early
    lora: bool = False  # train an adapter and merge it; false: all weights

    def idle(self) -> Iterator[tuple[str, str]]:
        if not self.probe_every:
            yield "until", "without probe_every: set probe_every, or"
            yield "probe_tasks", "without probe_every: set probe_every, or"

    @model_validator(mode="after")
    def _fills_a_step(self) -> WarmStartConfig:
        if self.episodes_per_step > self.episodes:
            raise ValueError(
                f"episodes_per_step is {self.episodes_per_step}; it must be at most episodes, {self.episodes}"
            )
        return self


class RolloutConfig(_Section):
    """How episodes are sampled for training."""

    tasks_per_step: Count = 16
    group_size: Count = 8  # episodes a task, siblings of one group
    max_turn_tokens: Count = 256  # sampled in one turn
    max_episode_tokens: Count = 2048  # of the whole conversation: the context
    temperature: Positive = 1.0  # above 0: training needs sampling
    deadline_s: Positive = 60.0  # seconds for one step of the environment, its tools' deadlines on top
    request_deadline_s: Positive = 600.0  # seconds for one request to the engine, from when it was sent
    retries: CountOrZero = 2  # fresh environments after a fault of the world, before the episode is invalid
    max_invalid: Fraction = 0.2  # share of a step's episodes; the run stops above it
    stall_s: Positive = 60.0  # seconds in which no episode gets on, until the log says what they wait for

    @model_validator(mode="after")
    def _turn_fits(self) -> RolloutConfig:
        if self.max_turn_tokens > self.max_episode_tokens:
            allowed = f"it must be at most max_episode_tokens, {self.max_episode_tokens}"
            raise ValueError(f"max_turn_tokens is {self.max_turn_tokens}; {allowed}")
        return self


class EngineConfig(_Section):
    """What samples the tokens; ``engine: vllm`` is short for ``engine: {kind: vllm}``."""

    # torch in this process; vLLM in a process of its own; a server of OpenAI's API, such as `vllm serve`
    kind: Literal["embedded", "vllm", "openai"] = "embedded"
    max_sequences: Count = 128  # sequences decoded at once; of a server: requests at once
    deterministic: bool = False  # embedded: results independent of timing, bit for bit
    swap: Literal["finish", "continue"] = (
        "finish"  # vllm: what runs when new weights come keeps the old ones, or goes on with the new ones
    )
    merge: bool = False  # vllm, on a GPU: adapters go into its weights; false: its LoRA kernels serve them
    share_gpu: bool = False  # vllm: on the learner's GPU; it sleeps, its memory free, while the learner works
    gpus: Places | None = None  # vllm: GPUs of its own, as torch numbers them; null: it sees all, and takes 0
    args: dict[str, Any] = {}  # vllm: its engine's arguments by their own names, gpu_memory_utilization say
    url: Text | None = None  # openai: of the API, its version included, http://127.0.0.1:8000/v1 say
    model: Text | None = None  # openai: the base's name on the server; null: that of model.path
    dialect: Literal["vllm", "openai"] = "vllm"  # openai: only the fields that OpenAI documents; no training
    api_key_env: Text | None = None  # openai: environment variable that holds the key; null: it needs none
    adapter_dir: Text | None = (
        None  # openai: folder that this process writes adapters to and the server reads
    )
    request_retries: CountOrZero = 6  # openai: of a request, after its first attempt
    backoff_s: Positive = 1.0  # openai: seconds before the first retry, at most; doubles from retry to retry

    @model_validator(mode="before")
    @classmethod
    def _takes_its_kind(cls, values: Any) -> Any:
        return {"kind": values} if isinstance(values, str) else values

    def idle(self) -> Iterator[tuple[str, str]]:
        for kind, names in _ENGINE_FIELDS.items():
            if kind != self.kind:
                yield from ((name, f"with kind: {self.kind}") for name in names)

    @model_validator(mode="after")
    def _knows_its_server(self) -> EngineConfig:
        if self.kind == "openai" and self.url is None:
            raise ValueError("url is missing: kind: openai needs it, such as http://127.0.0.1:8000/v1")
        if self.gpus is not None and (self.merge or self.share_gpu):
            name = "merge" if self.merge else "share_gpu"
            raise ValueError(f"{name} is true; it must be false with gpus: it takes the learner's own GPU")
        return self


_ENGINE_FIELDS = {  # that one kind has alone
    "embedded": ("deterministic",),
    "vllm": ("swap", "merge", "share_gpu", "gpus", "args"),
    "openai": ("url", "model", "dialect", "api_key_env", "adapter_dir", "request_retries", "backoff_s"),
}


class AlgorithmConfig(_Section):
    """How rewards become a loss."""

    advantage: Literal["grpo", "dr_grpo", "rloo"] = "grpo"
    clip_low: BelowOne = 0.2  # ratio is clipped below at 1 - clip_low
    clip_high: Positive = 0.28  # and above at 1 + clip_high; both act from the second minibatch on
    kl: NotNegative = 0.0  # weight of the k2 penalty to the adapter-free base; 0: no reference is computed
    minibatches: Count = 1  # optimizer steps a batch of rollouts
    max_staleness: CountOrZero = 0  # versions that rollouts may run ahead; 0: strictly on-policy
    # Weight of a token's loss for what sampler and learner differ in: cut at the cap, or 0 outside of floor
    # and cap. null: none with the embedded engine, which computes what the learner does, else truncate.
    importance: Literal["none", "truncate", "mask"] | None = None
    importance_cap: AtLeastOne = 2.0  # largest weight
    importance_floor: Fraction = 0.5  # mask: smallest weight that is kept
    shuffle_rewards: bool = False  # control experiment: permute rewards among the siblings of each group

    def idle(self) -> Iterator[tuple[str, str]]:
        if self.importance in (None, "none"):
            yield "importance_cap", "without importance: truncate or mask: set one of them, or"
        if self.importance != "mask":
            yield "importance_floor", "without importance: mask: set it, or"


class OptimizerConfig(_Section):
    """AdamW and its learning rate over the run's steps."""

    learning_rate: Positive = 1e-4  # peak
    schedule: Literal["linear", "cosine", "constant"] = "linear"  # decay by step count
    final_fraction: Fraction = 0.1  # of the peak, at the last step
    warmup_steps: CountOrZero = 0  # steps of linear rise from 0
    weight_decay: NotNegative = 0.0  # decoupled
    betas: Betas = (0.9, 0.999)
    grad_clip: Positive = 1.0  # largest norm of the whole gradient

    def idle(self) -> Iterator[tuple[str, str]]:
        if self.schedule == "constant":
            yield "final_fraction", "with schedule: constant"


class BatchConfig(_Section):
    """How an update is cut to fit in memory; the numbers do not depend on it."""

    tokens_per_microbatch: Count = 8192
    logprob_rows: Count = 1024  # token positions whose logits exist at once
    activation_checkpointing: bool = False  # recompute activations in the backward pass


class EvaluationConfig(_Section):
    """Held-out pass@k before and after the run, and in between."""

    every: CountOrZero = 0  # steps between the evaluations of the curve; 0: before and after only
    tasks: Count = 200  # held-out tasks, before and after
    curve_tasks: Count = 100  # held-out tasks in between
    samples: Count = 4  # episodes a task, n
    k: Counts = (1,)  # pass@k for each
    temperature: NotNegative = 1.0  # 0: greedy
    top_p: Nucleus = 1.0
    top_k: CountOrZero = 0  # 0: all tokens
    greedy: bool = False  # also one greedy episode a task, reported beside

    def idle(self) -> Iterator[tuple[str, str]]:
        if not self.every:
            yield "curve_tasks", "with every: 0"
        if self.temperature == 0:
            for name in ("top_p", "top_k", "greedy"):
                yield name, "with temperature: 0, which is greedy already"

    @model_validator(mode="after")
    def _has_samples_for_k(self) -> EvaluationConfig:
        if max(self.k) > self.samples:
            raise ValueError(f"k is {list(self.k)}; each must be at most samples, {self.samples}")
        if self.temperature == 0 and self.samples > 1:
            raise ValueError(f"samples is {self.samples}, all the same with temperature: 0; set samples to 1")
        return self


class CheckpointConfig(_Section):
    """When the run is saved; it is saved at its end in any case."""

    every: Count = 10  # steps between checkpoints
    keep: Count = 2  # of the newest; the best by held-out pass@k of the curve stays beside them


class LogConfig(_Section):
    """Where the metrics go beside metrics.jsonl."""

    trackers: Names = ("tensorboard",)  # accelerate's trackers by name
    transcripts: CountOrZero = 2  # episodes written to trajectories/ a step, of different tasks


class RunConfig(_Section):
    """One run, resolved."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = (
        "run"  # of its folder; the file's stem
    )
    seed: CountOrZero = 0  # of everything random
    steps: CountOrZero = 100  # of the loop; 0: evaluation and warm start only
    environment: EnvironmentConfig
    model: ModelConfig
    lora: LoraConfig = LoraConfig()
    warm_start: WarmStartConfig | None = None  # null: the model as it is
    rollout: RolloutConfig = RolloutConfig()
    engine: EngineConfig = EngineConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    batch: BatchConfig = BatchConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    output: Text = "runs"  # folder that holds the run's folder

    @model_validator(mode="after")
    def _chooses_importance(self) -> RunConfig:
        """Where nothing is said: on-policy the embedded engine's weights are 1 up to rounding."""
        if self.algorithm.importance is None:
            chosen = "none" if self.engine.kind == "embedded" else "truncate"
            algorithm = self.algorithm.model_copy(update={"importance": chosen})
            object.__setattr__(self, "algorithm", algorithm)
        return self

    @model_validator(mode="after")
    def _engine_fits(self) -> RunConfig:
        engine = self.engine
        if engine.kind != "embedded" and self.lora.train_norms and not engine.merge:
            other = ", or engine.merge true" if engine.kind == "vllm" else ""
            reason = f"with engine.kind: {engine.kind}, which serves LoRA's matrices and no norms{other}"
            raise ValueError(f"lora.train_norms is true; it must be false {reason}")
        if engine.share_gpu and self.algorithm.max_staleness:
            reason = "rollouts that go on during the update can't leave the GPU to it"
            raise ValueError(f"engine.share_gpu is true; it must be false with max_staleness: {reason}")
        if engine.kind != "openai":
            return self
        if engine.dialect != "vllm":
            reason = "other servers don't say which tokens they sampled"
            raise ValueError(f"engine.dialect is {engine.dialect!r}; training needs vllm: {reason}")
        if engine.adapter_dir is None:
            raise ValueError("engine.adapter_dir is missing: training hands adapters to the server there")
        if self.warm_start is not None or self.model.tiny is not None:
            made = "model.tiny" if self.warm_start is None else "warm_start"
            reason = "makes a base that the server does not have; make it first, serve it and name its folder"
            raise ValueError(f"{made} can't be used with engine.kind: openai: it {reason}")
        return self

    @model_validator(mode="after")
    def _sections_fit_together(self) -> RunConfig:
        rollout, algorithm = self.rollout, self.algorithm
        episodes = rollout.tasks_per_step * rollout.group_size
        warmup_steps = self.optimizer.warmup_steps
        if algorithm.max_staleness and self.engine.kind == "embedded":
            reason = "which shares this process with the learner and is strictly on-policy"
            raise ValueError(
                f"algorithm.max_staleness is {algorithm.max_staleness}; it must be 0 with engine.kind: "
                f"embedded, {reason}; set engine.kind to vllm or openai, or remove it"
            )
        longest, budget = rollout.max_episode_tokens, self.batch.tokens_per_microbatch
        if budget < longest:
            allowed = (
                f"it must be at least rollout.max_episode_tokens, {longest}, as one episode may be that long"
            )
            raise ValueError(f"batch.tokens_per_microbatch is {budget}; {allowed}")
        if algorithm.minibatches > episodes:
            allowed = f"it must be at most the episodes of a step, {episodes}"
            raise ValueError(f"algorithm.minibatches is {algorithm.minibatches}; {allowed}")
        if rollout.group_size == 1 and algorithm.advantage != "rloo":
            reason = f"every {algorithm.advantage} advantage of a group of one is 0"
            raise ValueError(f"rollout.group_size is 1; it must be at least 2: {reason}")
        if rollout.group_size == 1 and algorithm.shuffle_rewards:
            raise ValueError("algorithm.shuffle_rewards has no effect with rollout.group_size: 1: remove it")
        if 0 < self.steps <= warmup_steps:
            raise ValueError(
                f"optimizer.warmup_steps is {warmup_steps}; it must be below steps, {self.steps}"
            )
        return self


def _values(section: _Section) -> dict[str, Any]:
    """The section as plain data, without its idle fields: what loads back equal."""
    idle = {name for name, _ in section.idle()}
    values: dict[str, Any] = section.model_dump(mode="json", exclude=idle)
    for name in type(section).model_fields:
        child = getattr(section, name)
        if isinstance(child, _Section):
            values[name] = _values(child)
    return values


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML, defaults included; loading it gives an equal configuration."""
    try:
        return yaml.safe_dump(_values(config), sort_keys=False, allow_unicode=True)
    except PydanticSerializationError as error:
        raise BadConfig(
            f"the configuration holds what can't be written down: {error}; give plain values, and rewards of "
            "your own by the name that they are registered under"
        ) from None
