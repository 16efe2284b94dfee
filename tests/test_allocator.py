from __future__ import annotations

import os
import subprocess
import sys

import pytest

_RESIDENT = """
import asyncio, numpy as np
from agentrl.threads import in_compute_thread

def resident_mib():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20

def grow():
    block = np.ones(200 << 20, np.uint8)
    return resident_mib()

before = resident_mib()
during = asyncio.run(in_compute_thread(grow))
print(during - before, resident_mib() - before)
"""


def _growth_mib(**environment: str) -> tuple[float, float]:
    """Resident memory above the beginning while a block of 200 MiB lives, and after it was freed."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", _RESIDENT]
    ran = subprocess.run(
        command, env={**clean, **environment}, capture_output=True, text=True, timeout=60, check=True
    )
    during, after = map(float, ran.stdout.split())
    return during, after


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only glibc is told how to manage memory")
def test_the_compute_thread_keeps_the_memory_that_it_freed() -> None:
    during, after = _growth_mib()
    assert during > 190
    assert after > 190


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only glibc is told how to manage memory")
def test_settings_of_the_users_own_are_left_alone() -> None:
    during, after = _growth_mib(MALLOC_TOP_PAD_="131072")
    assert during > 190
    assert after < 50
