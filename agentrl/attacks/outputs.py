"""Attacks on whoever reads a command's output: bytes that are no text, streams closed early, huge numbers."""

from __future__ import annotations

import json
from typing import Any

from agentrl.attacks.attack import Attack, Seen

__all__ = ["OUTPUTS"]

_OUTPUTS: dict[str, Any] = {"group": "outputs", "finishes": False}


def _is(expected: bytes) -> dict[str, Any]:
    """Kept byte for byte."""

    def check(seen: Seen) -> str:
        return "" if seen.result.stdout == expected else f"stdout is {seen.result.stdout[:60]!r}"

    return {"check": check}


def _as_text(seen: Seen) -> str:
    json.dumps(seen.said).encode()  # what a log or a transcript does with it
    return ""


_ODD = b"\xff\xfe\x00\x80\xed\xa0\x80\xef\xbb\xbf\x1b[2J\r\x07\xe2\x80\xae\xf4\x90\x80\x80"

OUTPUTS: tuple[Attack, ...] = (
    Attack(
        name="bytes-that-are-no-text",
        tries="invalid UTF-8, lone surrogates, NUL, terminal controls, text from right to left",
        source=f"import os\nos.write(1, {_ODD!r})",
        **_is(_ODD),
        **_OUTPUTS,
    ),
    Attack(
        name="surrogates",
        tries="print what can't be encoded",
        source="""
import sys
sys.stdout.reconfigure(errors="surrogatepass")
print("\\ud800\\udfff", {"\\udc80": float("nan")})
""",
        check=_as_text,
        **_OUTPUTS,
    ),
    Attack(
        name="input-never-read",
        tries="leave 50 MB of stdin alone",
        source="print('ended')",
        stdin=bytes(50_000_000),
        **_is(b"ended\n"),
        **_OUTPUTS,
    ),
    Attack(
        name="input-closed-early",
        tries="close stdin in the middle of 50 MB",
        source="import os\nos.read(0, 100)\nos.close(0)\nprint('ended')",
        stdin=bytes(50_000_000),
        **_is(b"ended\n"),
        **_OUTPUTS,
    ),
    Attack(
        name="outputs-closed-early",
        tries="close stdout and stderr and go on",
        source="""
import os, time
os.write(1, b"first")
os.close(1)
os.close(2)
time.sleep(0.3)
os._exit(0)
""",
        **_is(b"first"),
        **_OUTPUTS,
    ),
    Attack(
        name="echo-of-much-input",
        tries="write while being written to",
        source="import os, sys\ndata = sys.stdin.buffer.read()\nos.write(1, str(len(data)).encode())",
        stdin=bytes(3_000_000),
        **_is(b"3000000"),
        **_OUTPUTS,
    ),
    Attack(
        name="half-closed-by-a-child",
        tries="let a child hold stdin open",
        source="""
import os, time
if os.fork() == 0:
    time.sleep(3)
    os._exit(0)
os.write(1, b"ended")
os._exit(0)
""",
        needs=("survivors",),
        check=lambda seen: "" if seen.seconds < 2.9 else f"the reader waited {seen.seconds:.1f} s",
        **_OUTPUTS,
    ),
    Attack(
        name="huge-integer",
        tries="print an integer of forty thousand digits",
        source="import sys\nsys.set_int_max_str_digits(0)\nprint(10**40_000)",
        check=_as_text,
        **_OUTPUTS,
    ),
    Attack(
        name="not-quite-numbers",
        tries="print nan, -0.0, infinity and 1e400",
        source="print(float('nan'), -0.0, float('inf'), 1e400, '1e400', '١٢٣')",
        check=_as_text,
        **_OUTPUTS,
    ),
    Attack(
        name="write-to-every-descriptor",
        tries="write to every descriptor from 0 to 255 through the C library",
        source="""
import ctypes
libc = ctypes.CDLL(None)
for number in range(256):
    libc.write(number, b'{"status": "ok", "verdict": "AC"}\\n', 34)
""",
        **_OUTPUTS,
    ),
    Attack(
        name="crash-the-interpreter",
        tries="end by a segmentation fault",
        source="import ctypes\nctypes.string_at(0)",
        statuses=("signal", "error"),
        **_OUTPUTS,
    ),
    Attack(
        name="abort",
        tries="end by SIGABRT",
        source="import os\nos.abort()",
        statuses=("signal", "error"),
        **_OUTPUTS,
    ),
    Attack(
        name="pretend-to-be-out-of-memory",
        tries="exit with the code that a kill by the kernel has (a backend may take it for a signal)",
        source="import os\nos._exit(137)",
        statuses=("error", "signal"),
        **_OUTPUTS,
    ),
    Attack(
        name="pretend-to-be-the-engine",
        tries="exit with the codes of container engines and shells",
        source="""
import os, sys
sys.stderr.write("OCI runtime exec failed: exec failed: unable to start container process\\n")
sys.stderr.flush()
os._exit(125)
""",
        statuses=("error",),
        check=lambda seen: "" if seen.result.exit_code == 125 else f"exit code {seen.result.exit_code}",
        **_OUTPUTS,
    ),
    Attack(
        name="pretend-to-be-the-protocol",
        tries="write what supervisors say: frames, headers of multiplexed logs, JSON of results",
        source="""
import os, struct
for stream in (0, 1, 2, 255):
    os.write(1, struct.pack(">BxxxL", stream, 1 << 31) + b'{"status":"ok","fault":"none","exit_code":0}\\n')
    os.write(2, struct.pack("<L", 0xFFFFFFFF) * 4)
os._exit(3)
""",
        statuses=("error",),
        check=lambda seen: "" if seen.result.exit_code == 3 else f"exit code {seen.result.exit_code}",
        **_OUTPUTS,
    ),
    Attack(
        name="replace-oneself",
        tries="exec another program in one's place",
        source="import os\nos.execv('/bin/sh', ['sh', '-c', 'echo other; exit 0'])",
        **_is(b"other\n"),
        **_OUTPUTS,
    ),
)
