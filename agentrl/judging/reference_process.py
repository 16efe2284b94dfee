"""The inside of a sandbox that asks a reference solution what is right.

stdin is JSON: ``{"source", "entry_point", "inputs": typed lists of arguments, "memory_mib"}``. stdout gets
one JSON list: for each input ``[typed value]``, or ``[]`` where the reference raised, wanted more memory, or
gave no plain data or megabytes of it. Standard library only and Python 3.8: it is sent as source, behind that
of ``agentrl.judging.plain``.
"""

from __future__ import annotations

import json
import os
import resource
import sys

from agentrl.judging.plain import NotPlain, decode, encode

__all__ = ["serve"]

_MOST_ANSWER = 1 << 20  # bytes of JSON
_MOST_ANSWERS = 1 << 25  # of all: half of what the host keeps


def serve() -> None:
    """Answer and end."""
    asked = json.loads(sys.stdin.buffer.read())
    memory, (_, most) = asked["memory_mib"] << 20, resource.getrlimit(resource.RLIMIT_AS)
    if most == resource.RLIM_INFINITY or memory < most:
        resource.setrlimit(resource.RLIMIT_AS, (memory, most))
    told = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a reference prints
    names = {"__name__": "reference"}
    exec(compile(asked["source"], "reference", "exec"), names)
    function = names[asked["entry_point"]]
    answers, left = [], _MOST_ANSWERS
    for given in asked["inputs"]:
        try:
            answer = json.dumps([encode(function(*decode(given)))])  # type: ignore[operator]
        except NotPlain:
            answer = "[]"
        except Exception:  # the data set's own: an input that the reference refuses
            answer = "[]"
        answers.append(answer if len(answer) <= min(_MOST_ANSWER, left) else "[]")
        left -= len(answers[-1])
    told.write(f"[{','.join(answers)}]".encode())
    told.flush()
