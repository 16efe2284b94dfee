"""The inside of a sandbox that asks a reference solution what is right.

stdin is JSON: ``{"source", "entry_point", "inputs": typed lists of arguments}``. stdout gets one JSON list:
for each input ``[typed value]``, or ``[]`` where the reference raised or gave no plain data. Standard library
only and Python 3.8: it is sent as source, behind that of ``agentrl.plain``.
"""

from __future__ import annotations

import json
import os
import sys

from agentrl.plain import NotPlain, decode, encode

__all__ = ["serve"]


def serve() -> None:
    """Answer and end."""
    asked = json.loads(sys.stdin.buffer.read())
    told = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a reference prints
    names = {"__name__": "reference"}
    exec(compile(asked["source"], "reference", "exec"), names)
    function = names[asked["entry_point"]]
    answers = []
    for given in asked["inputs"]:
        try:
            answers.append([encode(function(*decode(given)))])  # type: ignore[operator]
        except NotPlain:
            answers.append([])
        except Exception:  # the data set's own: an input that the reference refuses
            answers.append([])
    told.write(json.dumps(answers).encode())
    told.flush()
