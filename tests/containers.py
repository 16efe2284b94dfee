"""What the tests of the docker backend share: an engine's containers, seen through its command line."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from typing import Any

from agentrl.registry import make_sandbox
from agentrl.sandbox import Backend, ExecResult, Limits, Sandbox

IMAGE = os.environ.get("AGENTRL_DOCKER_IMAGE", "agentrl-python:bookworm")
LIMITS = Limits(cpu_s=20, wall_s=60, memory_mib=128, pids=32, disk_mib=8, output_kib=16)


def changed(**changes: Any) -> Limits:
    """LIMITS, but for these."""
    return Limits(**{**{name: getattr(LIMITS, name) for name in Limits.__slots__}, **changes})


def docker_backend(**kwargs: Any) -> Backend:
    """One of the tests' image, which keeps nothing ready."""
    return make_sandbox("docker", **{"image": IMAGE, "pool": 0, **kwargs})


def run_python(sandbox: Sandbox, code: str, **changes: Any) -> ExecResult:
    """Run ``code``, with these limits lower."""
    return sandbox.run(["python3", "-c", code], limits=changed(**changes) if changes else None)


def said(sandbox: Sandbox, code: str) -> str:
    """What ``code`` prints."""
    result = run_python(sandbox, code)
    assert result.status == "ok", result
    return result.stdout.decode().strip()


def docker(*words: str) -> str:
    """What the command line says."""
    return subprocess.run(["docker", *words], capture_output=True, text=True, check=True, timeout=60).stdout


def containers(owner: int | None = None) -> list[str]:
    """Those of process ``owner``, this one by default, whatever their state."""
    return docker("ps", "-aq", "--filter", f"name=agentrl-{owner or os.getpid()}-").split()


def until(happened: Callable[[], bool], *, within_s: float = 30.0) -> bool:
    """Whether it happens in time."""
    end = time.monotonic() + within_s
    while not (found := happened()) and time.monotonic() < end:
        time.sleep(0.05)
    return found
