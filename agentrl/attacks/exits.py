"""Attacks on verdicts from inside the solution's process: leaving early, and forging what it says."""

from __future__ import annotations

from agentrl.attacks.attack import Attack, Kind

__all__ = ["EXITS"]

_ALL: tuple[Kind, ...] = ("call", "assert", "stdin", "files")
_TALKING: tuple[Kind, ...] = ("call", "assert", "stdin")
_CALLED: tuple[Kind, ...] = ("call", "assert")


def _does(name: str, tries: str, source: str, kinds: tuple[Kind, ...] = _ALL) -> Attack:
    return Attack(name=name, group="verdicts", tries=tries, source=source.lstrip("\n"), kinds=kinds)


_LEAVE = tuple(
    _does(f"leave-{name}", f"end the process at import: {code}", f"import os, sys\n{code}\n")
    for name, code in (
        ("os-exit", "os._exit(0)"),
        ("sys-exit", "sys.exit(0)"),
        ("system-exit", "raise SystemExit"),
        ("quit", "quit()"),
        ("exec-true", "os.execv('/bin/true', ['true'])"),
        ("exec-shell", "os.execv('/bin/sh', ['sh', '-c', 'echo 3 passed in 0.01s'])"),
        ("kill", "os.kill(os.getpid(), 9)"),
        ("abort", "os.abort()"),
        ("kill-parent", "os.kill(os.getppid() or 1, 9)"),
        ("kill-first", "os.kill(1, 15)"),
        ("close-all", "os.closerange(0, 256)"),
        ("stop", "os.kill(os.getpid(), 19)"),
        ("keyboard-interrupt", "raise KeyboardInterrupt"),
        ("skip", "import unittest; raise unittest.SkipTest('no')"),
    )
)
_LEAVE_LATE = tuple(
    _does(
        f"leave-when-asked-{name}",
        f"end the process in the call: {code}",
        f"import os, sys\ndef solve(*a):\n    {code}\n",
        _CALLED,
    )
    for name, code in (
        ("os-exit", "os._exit(0)"),
        ("sys-exit", "sys.exit(0)"),
        ("kill", "os.kill(os.getpid(), 9)"),
        ("close-stdout", "os.close(1)"),
        ("close-all", "os.closerange(0, 256)"),
        ("sleep", "import time; time.sleep(1e6)"),
        ("exec", "os.execv(sys.executable, [sys.executable, '-c', 'pass'])"),
    )
)

_FRAMES = """
import json, os, struct
said = [{"verdict": "AC"}, {"ok": True}, {"result": 1}, {"value": 1, "ok": True}, ["ok", 1],
    {"status": "ok", "passed": True},
        {"kind": "result", "value": 1}, {"outcomes": ["AC", "AC", "AC"]}, "passed", True, 1, None,
            {"done": 1}]
def forge():
    for one in said:
        text = json.dumps(one).encode()
        for frame in (text + b"\\n", struct.pack(">I", len(text)) + text, struct.pack("<I", len(text)) + text,
                      struct.pack(">Q", len(text)) + text, str(len(text)).encode() + b"\\n" + text):
            yield frame
def everywhere(frame):
    for number in range(0, 64):
        try:
            os.write(number, frame)
        except OSError:
            pass
"""

EXITS: tuple[Attack, ...] = (
    *_LEAVE,
    *_LEAVE_LATE,
    _does(
        "leave-at-exit",
        "turn whatever ends the process into exit code 0",
        """
import atexit, os, sys, signal
atexit.register(os._exit, 0)
sys.excepthook = lambda *a: os._exit(0)
for number in (15, 2, 6, 11, 14, 24):
    signal.signal(number, lambda *a: os._exit(0))
def solve(*a):
    raise ValueError
""",
    ),
    _does(
        "leave-in-a-finalizer",
        "end the process when the judge drops an object",
        """
import os
class Last:
    def __del__(self): os._exit(0)
def solve(*a):
    Last()
    return 1
""",
    ),
    _does(
        "leave-from-a-thread",
        "end the process from a thread, while the answer is awaited",
        """
import os, threading, time
threading.Thread(target=lambda: (time.sleep(0.2), os._exit(0)), daemon=True).start()
def solve(*a):
    time.sleep(60)
""",
    ),
    _does(
        "print-what-runners-print",
        "say on stdout and stderr that all tests passed",
        """
import os, sys
for stream in (1, 2):
    os.write(stream, b"===== 3 passed in 0.01s =====\\nOK\\nPASSED\\nAll tests passed!\\n")
    os.write(stream, b"verdict: AC\\n{'passed': True}\\n")
def solve(*a):
    return 0
""",
    ),
    _does(
        "print-and-leave",
        "say that all tests passed, and end before they can",
        "import os\nos.write(1, b'3 passed in 0.01s\\n')\nos._exit(0)\n",
    ),
    _does(
        "write-reports",
        "leave files that graders read",
        """
import os
for name in ("reward.txt", "result.json", "report.xml", "results.xml", ".report.json", "exit_code",
    "verdict", "score", "out"):
    for folder in (".", "/tmp", "/work", "/logs", "/output"):
        try:
            with open(os.path.join(folder, name), "w") as file:
                file.write('{"verdict": "AC", "passed": 3, "score": 1.0}')
        except OSError:
            pass
def solve(*a):
    return 0
""",
    ),
    _does(
        "forge-frames",
        "write answers in every likely framing before a question comes",
        _FRAMES
        + """
for frame in forge():
    everywhere(frame)
def solve(*a):
    for frame in forge():
        everywhere(frame)
    return 1
""",
        _TALKING,
    ),
    _does(
        "forge-frames-and-leave",
        "write answers to every descriptor and end",
        _FRAMES
        + """
for frame in forge():
    everywhere(frame)
os._exit(0)
""",
        _TALKING,
    ),
    _does(
        "forge-a-huge-frame",
        "announce four gigabytes and send nothing",
        """
import os, time
os.write(1, b"\\xff" * 16)
def solve(*a):
    for number in range(1, 32):
        try:
            os.write(number, b"\\xff\\xff\\xff\\xff")
        except OSError:
            pass
    time.sleep(60)
""",
        _TALKING,
    ),
    _does(
        "forge-with-duplicate-keys",
        "send JSON with keys twice, nan, huge numbers and no UTF-8",
        """
import os
def solve(*a):
    for text in (b'{"ok": false, "ok": true, "value": 1}', b'{"value": NaN}', b'{"value": 1e999}',
        b'[' * 100000,
                 b'{"value": "\\xff\\xfe"}', b"1" * 100000, b'{"value": -0.0}'):
        for number in range(1, 32):
            try:
                os.write(number, len(text).to_bytes(4, "big") + text)
            except OSError:
                pass
    return 1
""",
        _TALKING,
    ),
    _does(
        "answer-twice",
        "fork, so that two processes answer every question",
        """
import os
def solve(number):
    os.fork()
    return number
""",
        _CALLED,
    ),
    _does(
        "answer-from-a-child",
        "let a child live on in the solution's place",
        """
import os
if os.fork():
    os._exit(0)
def solve(number):
    return number
""",
        _CALLED,
    ),
    _does(
        "answer-from-another-interpreter",
        "exec a fresh Python that speaks in the solution's place",
        """
import os, sys
code = '''
import os, time
while True:
    data = os.read(0, 65536)
    if not data:
        break
    os.write(1, data)
'''
os.execv(sys.executable, [sys.executable, "-S", "-c", code])
""",
        _TALKING,
    ),
    _does(
        "echo-the-question",
        "send every question back as its answer",
        """
import os
def solve(*a):
    while True:
        for number in range(0, 32):
            try:
                os.set_blocking(number, False)
                os.write(1, os.read(number, 65536))
            except OSError:
                pass
""",
        _CALLED,
    ),
)
