"""What would stop a run that has begun, found before it leaves anything behind.

Cheap things first: the output folder, the environment and its reward, its splits, the model's folder; then
the chat template with the longest known prompt, and the memory. What passes here may still fail
later: a model on the hub is only looked at once its weights are downloaded, and of a stream of tasks only the
first ones are known.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path

from agentrl.chats import Chats
from agentrl.config import RunConfig
from agentrl.env import Env
from agentrl.errors import BadConfig, BadData
from agentrl.memory import available_mib, check_memory, plan_memory
from agentrl.modelfiles import ModelFiles, find_model_files
from agentrl.parsers import VLLM_PREFIX, get_parser
from agentrl.registry import make
from agentrl.types import Task

__all__ = ["check_run", "check_splits", "check_writable"]

_LOOKED_AT = 1024  # tasks of a split among which the longest prompt is sought


def check_run(config: RunConfig, *, device: str = "cpu") -> None:
    """Raises UserError for what is wrong with a run's plan on ``device``; writes nothing."""
    check_writable(Path(config.output) / config.name, key="output")
    if config.model.parser is not None and not config.model.parser.startswith(VLLM_PREFIX):
        get_parser(config.model.parser)  # vLLM's need a tokenizer, which only a model on disk has yet
    splits = (config.environment.train, config.environment.held_out)
    with closing(make(config.environment.id, **config.environment.args)) as env:
        check_splits(env, splits)
        model = None if config.model.path is None else find_model_files(config.model.path)
        if model is not None:
            _check_context(config, model)
        # Before the tokenizer is loaded: where the weights alone are too large, that is the news.
        _check_memory(config, model, device=device)
        if config.model.path is not None:
            tokens = _check_openings(config, config.model.path, env, splits)
            _check_memory(config, model, device=device, opening_tokens=tokens)


def check_splits(env: Env, splits: Iterable[str]) -> None:
    """Raises BadData for a split that is unknown, can't be read or holds no task."""
    for split in splits:
        if not _first_tasks(env, split, 1):
            raise BadData(
                f"the split {split!r} of {type(env.unwrapped).__name__} has no tasks: fill it, or choose "
                f"another of {', '.join(env.splits)}"
            )


def check_writable(folder: Path, *, key: str) -> None:
    """Raises BadConfig where nothing can be written in ``folder``, which need not exist; ``key`` is what sets
    it."""
    nearest = folder.absolute()
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise BadConfig(
            f"can't write in {folder}: {nearest}: {error.strerror}; "
            f"set {key} to a folder that you may write in"
        ) from None


def _first_tasks(env: Env, split: str, count: int) -> list[Task]:
    return list(islice(iter(env.task_list(split)), count))


def _check_context(config: RunConfig, model: ModelFiles) -> None:
    reach, wanted = model.config.get("max_position_embeddings"), config.rollout.max_episode_tokens
    if isinstance(reach, int) and wanted > reach:
        raise BadConfig(
            f"rollout.max_episode_tokens is {wanted}, and the positions of the model in {model.folder} reach "
            f"{reach} tokens: lower it to at most {reach}, or take another model"
        )


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
