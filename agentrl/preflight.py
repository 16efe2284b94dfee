"""What would stop a run that has begun, found before it leaves anything behind.

Cheap things first: the output folder, the engine's settings, the environment and its reward, its splits, its
sandbox, the model's folder; then the chat template with the longest known prompt, and the memory. What passes
here may still fail later: a model on the hub is only looked at once its weights are downloaded, vLLM's own
arguments once it starts, and of a stream of tasks only the first ones are known.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import cast

from agentrl.chats import Chats
from agentrl.config import RunConfig
from agentrl.env import Env
from agentrl.errors import BadConfig, BadData, UserError
from agentrl.files import check_writable
from agentrl.memory import available_mib, check_memory, plan_memory
from agentrl.modelfiles import ModelFiles, find_model_files
from agentrl.parsers import VLLM_PREFIX, get_parser
from agentrl.registry import make
from agentrl.types import Task

__all__ = ["check_bare", "check_run", "check_splits"]

_LOOKED_AT = 1024  # tasks of a split among which the longest prompt is sought


def check_run(config: RunConfig, *, device: str = "cpu") -> None:
    """Raises UserError for what is wrong with a run's plan on ``device``; writes nothing."""
    check_writable(Path(config.output) / config.name, key="output")
    if config.model.parser is not None and not config.model.parser.startswith(VLLM_PREFIX):
        get_parser(config.model.parser)  # vLLM's need a tokenizer, which only a model on disk has yet
    if config.engine.kind != "embedded":
        from agentrl.serving import check_engine  # here, because it loads torch

        check_engine(config, device=device)
    splits = (config.environment.train, config.environment.held_out)
    with closing(make(config.environment.id, **config.environment.args)) as env:
        check_splits(env, splits)
        cast("Env", env.unwrapped).check_host()
        model = None if config.model.path is None else find_model_files(config.model.path)
        if model is not None:
            _check_context(config, model)
        if model is not None or config.model.tiny is not None:
            _check_layers(config)
        # Before the tokenizer is loaded: where the weights alone are too large, that is the news.
        _check_memory(config, model, device=device)
        if config.model.path is not None:
            tokens = _check_openings(config, config.model.path, env, splits)
            _check_memory(config, model, device=device, opening_tokens=tokens)


def check_bare(env: Env) -> None:
    """Raises UserError for a wrapped environment."""
    if not hasattr(env, "task_list"):
        inner = type(env.unwrapped).__name__
        raise UserError(
            f"{type(env).__name__} around {inner}: rollouts run the environment itself, where a wrapper of "
            f"Gymnasium's has no effect; give {inner}, and set its max_turns or end the episode in its step"
        )


def check_splits(env: Env, splits: Iterable[str]) -> None:
    """Raises BadData for a split that is unknown, can't be read or holds no task, UserError for a wrapper."""
    check_bare(env)
    for split in splits:
        if not _first_tasks(env, split, 1):
            raise BadData(
                f"the split {split!r} of {type(env.unwrapped).__name__} has no tasks: fill it, or choose "
                f"another of {', '.join(env.splits)}"
            )


def _first_tasks(env: Env, split: str, count: int) -> list[Task]:
    return list(islice(iter(env.task_list(split)), count))


def _check_context(config: RunConfig, model: ModelFiles) -> None:
    reach, wanted = model.config.get("max_position_embeddings"), config.rollout.max_episode_tokens
    if isinstance(reach, int) and wanted > reach:
        raise BadConfig(
            f"rollout.max_episode_tokens is {wanted}, and the positions of the model in {model.folder} reach "
            f"{reach} tokens: lower it to at most {reach}, or take another model"
        )


def _check_layers(config: RunConfig) -> None:
    """Raises BadConfig for layers to adapt that the model, built without its weights, does not have."""
    targets = config.lora.target_modules
    if isinstance(targets, str):
        return
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from agentrl.learner import check_targets
    from agentrl.models import load_settings

    if config.model.tiny is not None:
        settings = AutoConfig.for_model("qwen3", num_hidden_layers=config.model.tiny.layers)
    else:
        assert config.model.path is not None
        settings = load_settings(config.model.path).config
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(settings)
    except (ValueError, RuntimeError):  # what is wrong with the model is said where it is loaded
        return
    check_targets(model, targets)


def _check_memory(
    config: RunConfig, model: ModelFiles | None, *, device: str, opening_tokens: int = 0
) -> None:
    plan = plan_memory(config, model, opening_tokens=opening_tokens)
    if plan is not None:
        check_memory(plan, available=available_mib(device=device))


def _check_openings(config: RunConfig, path: str, env: Env, splits: Iterable[str]) -> int:
    """Tokens of the longest known prompt. Raises UserError where the model can't chat, or where nothing could
    be said after that prompt."""
    from agentrl.models import load_tokenizer  # here, because it loads torch

    chat = Chats(load_tokenizer(path), parser=config.model.parser, history=config.model.history)(env)
    limit, longest = config.rollout.max_episode_tokens, 0
    for split in splits:
        index = _longest_prompt(_first_tasks(env, split, _LOOKED_AT))
        messages, info = env.reset(seed=0, options={"split": split, "index": index})
        tokens = len(chat.open(messages))
        if tokens >= limit:
            raise BadConfig(
                f"the prompt of task {info['task_id']!r} in the split {split!r} has {tokens} tokens, and "
                f"rollout.max_episode_tokens is {limit}: nothing could be said; raise it above {tokens} or "
                "shorten the prompt"
            )
        longest = max(longest, tokens)
    return longest


def _longest_prompt(tasks: Sequence[Task]) -> int:
    sizes = [sum(len(message.content) for message in task.prompt) for task in tasks]
    return sizes.index(max(sizes))
