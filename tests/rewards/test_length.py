import pickle

import pytest

import agentrl
from agentrl.errors import BadConfig
from agentrl.reward import Evidence
from agentrl.types import Score, Task


def score(tokens: int) -> Score:
    reward = pickle.loads(pickle.dumps(agentrl.make_reward("length", max_tokens=20480, buffer_tokens=4096)))
    result: Score = reward(Evidence(Task(id="t", prompt=()), (), completion_tokens=tokens))
    return result


@pytest.mark.parametrize(
    ("tokens", "penalty"), [(0, 0), (16384, 0), (17000, -0.150391), (18432, -0.5), (20480, -1), (21000, -1)]
)
def test_the_overlong_penalty_of_dapo(tokens: int, penalty: float) -> None:
    result = score(tokens)
    assert result.value == pytest.approx(penalty, abs=1e-6)
    assert result.parts == {"overlong": result.value}
    assert bool(result.note) == (penalty < 0)


@pytest.mark.parametrize("limits", [(0, 0), (10, 11), (10, 0), (10, -1)])
def test_a_buffer_that_does_not_fit_is_refused(limits: tuple[int, int]) -> None:
    with pytest.raises(BadConfig, match="buffer"):
        agentrl.make_reward("length", max_tokens=limits[0], buffer_tokens=limits[1])
