"""What needs a missing engine: a skip for a user, a failure where AGENTRL_REQUIRE names it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

_TESTS = """
import pytest

@pytest.mark.vllm
def test_with_vllm():
    pass

def test_without():
    pass
"""


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
@pytest.mark.parametrize(
    ("required", "outcome", "code"),
    [
        ("", "1 passed, 1 skipped", 0),
        ("docker,vllm", "1 passed, 1 error", 1),
        ("gpu", "1 passed, 1 skipped", 0),
    ],
)
def test_a_missing_engine_is_skipped_or_fails_as_required(
    tmp_path: Path, required: str, outcome: str, code: int
) -> None:
    (tmp_path / "conftest.py").write_text((Path(__file__).parent / "conftest.py").read_text())
    (tmp_path / "test_engines.py").write_text(_TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = vllm\n")
    root = str(Path(__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-rsf", "-p", "no:cacheprovider", str(tmp_path)],
        env={**os.environ, "AGENTRL_REQUIRE": required, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert outcome in done.stdout
    assert "vLLM is not installed" in done.stdout
