"""``python -m agentrl``: the command line where the console script is not on the path."""

from __future__ import annotations

from agentrl.cli import main

__all__ = ()

if __name__ == "__main__":
    main()
