"""What tests of environments share that run what a model writes."""

from __future__ import annotations

import os
from contextlib import closing

import pytest

from agentrl.registry import make_sandbox


@pytest.fixture
def hardened() -> str:
    """A backend that enforces everything; where AGENTRL_REQUIRE names bwrap it has to."""
    with closing(make_sandbox("bubblewrap")) as backend:
        survey = backend.survey()
    if survey.available and not survey.missing:
        return "bubblewrap"
    lacks = str(dict(survey.missing)) if survey.available else survey.note
    if "bwrap" in os.environ.get("AGENTRL_REQUIRE", "").split(","):
        pytest.fail(f"{lacks}, and AGENTRL_REQUIRE names 'bwrap'", pytrace=False)
    pytest.skip(lacks)
