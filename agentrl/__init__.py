"""Reinforcement learning of tool-using language models.

    env = agentrl.make("calculator")        # a gymnasium.Env of messages and tool calls
    agentrl.check(env)                      # is it sound?
    agentrl.evaluate(env, model=..., n=16)  # pass@k with confidence intervals
    agentrl.train("configs/quickstart.yaml")

Importing this package loads no torch, transformers or vllm: the names that need them are imported when first
used.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

_package = Path(__file__).parent
if not (_package / "environments").is_dir():  # a checkout: the catalogues lie beside the package
    __path__.append(str(_package.parent))

from agentrl.env import Env  # noqa: E402  (the catalogues must be importable first)
from agentrl.errors import AgentRLError, ToolError, UserError, WorldError  # noqa: E402
from agentrl.registry import list_environments, list_rewards, make, make_reward, register  # noqa: E402
from agentrl.reward import Evidence, Gate, Reward, Rubric, WeightedSum  # noqa: E402
from agentrl.tool_env import ToolEnv  # noqa: E402
from agentrl.tools import tool  # noqa: E402
from agentrl.types import Message, Score, Task, ToolCall  # noqa: E402

if TYPE_CHECKING:
    from agentrl.checks import check
    from agentrl.evaluation import evaluate
    from agentrl.training import train

__all__ = [
    "AgentRLError",
    "Env",
    "Evidence",
    "Gate",
    "Message",
    "Reward",
    "Rubric",
    "Score",
    "Task",
    "ToolCall",
    "ToolEnv",
    "ToolError",
    "UserError",
    "WeightedSum",
    "WorldError",
    "check",
    "evaluate",
    "list_environments",
    "list_rewards",
    "make",
    "make_reward",
    "register",
    "tool",
    "train",
]

# The last two load torch, the first every attack of the catalogue.
_LAZY = {"check": "agentrl.checks", "evaluate": "agentrl.evaluation", "train": "agentrl.training"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'agentrl' has no attribute {name!r}")
