"""The catalogue of attacks: everything that a policy's code is known or feared to try.

``agentrl.selfcheck`` runs it against a backend, and ``agentrl.checks`` the verdicts' part of it against an
environment's reward. The names of attacks stay the same from release to release.
"""

from __future__ import annotations

from agentrl.attack import Attack, Group, Kind, Seen
from agentrl.attack_clocks import CLOCKS
from agentrl.attack_exits import EXITS
from agentrl.attack_files import FILES
from agentrl.attack_graders import GRADERS, TEXTS
from agentrl.attack_isolation import ISOLATION
from agentrl.attack_network import NETWORK
from agentrl.attack_outputs import OUTPUTS
from agentrl.attack_privileges import PRIVILEGES
from agentrl.attack_processes import PROCESSES
from agentrl.attack_resources import RESOURCES
from agentrl.attack_values import VALUES
from agentrl.attack_verdicts import SOLUTIONS

__all__ = ["ATTACKS", "COMMANDS", "VERDICTS", "Attack", "Group", "Kind", "Seen"]

# Tried as commands in a sandbox.
COMMANDS: tuple[Attack, ...] = (
    *RESOURCES,
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
