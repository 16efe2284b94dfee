"""What tests of environments share that run what a model writes."""

from __future__ import annotations

from contextlib import closing

import pytest

from agentrl.registry import make_sandbox


@pytest.fixture
def hardened() -> str:
    """A backend that enforces everything."""
    with closing(make_sandbox("bubblewrap")) as backend:
        survey = backend.survey()
    if survey.missing or not survey.available:
        pytest.skip(survey.note or str(survey.missing))
    return "bubblewrap"
