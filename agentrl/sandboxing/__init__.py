"""What the backends of ``agentrl.sandboxes`` are made of, and which of them a process uses."""

from __future__ import annotations

__all__: list[str] = []
