"""What it takes to start: seconds until agentrl is imported, and until its command line has printed its help.

    pip install -c constraints.txt -e ".[bench]"
    python benchmarks/startup.py

Every start is a process of its own, each in its turn, and the median of several counts. Beside them stand
Gymnasium, on which agentrl builds, and TRL; the limit is a Python that does nothing. Aims: under 0.5 seconds
for the import and under 1 for the help, the interpreter included.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from statistics import median

from report import Row, make_parser, missing, report

__all__ = ["main", "measure"]

_STARTS = {
    "import agentrl": ("-c", "import agentrl"),
    "agentrl --help": ("-c", "from agentrl.cli import main; main()", "--help"),
    "import gymnasium": ("-c", "import gymnasium"),
    "from trl import GRPOTrainer": ("-c", "from trl import GRPOTrainer"),
    "limit: python": ("-c", ""),
}
_PEERS = ("from trl import GRPOTrainer",)
_AIMS = {"import agentrl": 0.5, "agentrl --help": 1.0}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark that the command line asks for."""
    parser = make_parser(__doc__)
    parser.add_argument("--peer", action=argparse.BooleanOptionalAction, default=True, help="measure TRL too")
    options = parser.parse_args(arguments)
    notes = missing("TRL", module="trl") if options.peer else []
    rows = measure(1 if options.quick else 7, peer=options.peer and not notes)
    report(rows, title="Seconds until it has started", notes=notes, json_path=options.json)


def measure(repeats: int, *, peer: bool) -> list[Row]:
    """A row each with ``name``, ``seconds`` and the ``aim`` where there is one."""
    starts = {name: start for name, start in _STARTS.items() if peer or name not in _PEERS}
    seconds: dict[str, list[float]] = {name: [] for name in starts}
    for turn in range(1 + repeats):
        for name, start in starts.items():
            taken = _start(start)
            if turn:  # the first fills the disk's cache and writes bytecode
                seconds[name].append(taken)
    return [
        {"name": name, "seconds": median(taken), "aim": _AIMS.get(name)} for name, taken in seconds.items()
    ]


def _start(arguments: Sequence[str]) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, timeout=300)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
