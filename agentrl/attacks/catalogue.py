"""The catalogue of attacks: everything that a policy's code is known or feared to try.

``agentrl.attacks.selfcheck`` runs it against a backend, and ``agentrl.checks`` the verdicts' part of it
against an environment's reward. The names of attacks stay the same from release to release.
"""

from __future__ import annotations

from agentrl.attacks.attack import Attack, Group, Kind, Seen
from agentrl.attacks.clocks import CLOCKS
from agentrl.attacks.exits import EXITS
from agentrl.attacks.files import FILES
from agentrl.attacks.graders import GRADERS, TEXTS
from agentrl.attacks.isolation import ISOLATION
from agentrl.attacks.memory import MEMORY
from agentrl.attacks.network import NETWORK
from agentrl.attacks.outputs import OUTPUTS
from agentrl.attacks.privileges import PRIVILEGES
from agentrl.attacks.processes import PROCESSES
from agentrl.attacks.resources import RESOURCES
from agentrl.attacks.solutions import SOLUTIONS
from agentrl.attacks.values import VALUES

__all__ = ["ATTACKS", "COMMANDS", "VERDICTS", "Attack", "Group", "Kind", "Seen"]

# Tried as commands in a sandbox.
COMMANDS: tuple[Attack, ...] = (
    *RESOURCES,
    *MEMORY,
    *CLOCKS,
    *PROCESSES,
    *ISOLATION,
    *PRIVILEGES,
    *NETWORK,
    *FILES,
    *OUTPUTS,
)
# Tried as solutions before the judge.
VERDICTS: tuple[Attack, ...] = (*EXITS, *SOLUTIONS, *VALUES, *TEXTS, *GRADERS)

ATTACKS = (*COMMANDS, *VERDICTS)

assert len({attack.name for attack in ATTACKS}) == len(ATTACKS)
