"""stub"""

from __future__ import annotations

from typing import Any

__all__ = ["judge_workspace_once"]


def judge_workspace_once(files: Any, tests: Any, *, open_sandbox: Any, limits: Any) -> Any:
    raise NotImplementedError
