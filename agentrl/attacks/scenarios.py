"""Attacks that need the host's part: two sandboxes at once, races with a reader, a host that dies.

Each is a check as ``agentrl.attacks.backend_contract`` has them, of the groups of the catalogue.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import threading
import time

from agentrl.attacks.backend_contract import Check
from agentrl.attacks.bait import children, leftovers, processes_marked
from agentrl.attacks.files import SWAPPER
from agentrl.attacks.network import CHANNELS_LEFT, CHANNELS_SOUGHT
from agentrl.attacks.stage import Stage
from agentrl.errors import BadConfig
from agentrl.sandbox import Sandbox, SandboxLost

__all__ = ["SCENARIOS"]

_MANY = 50  # commands at once
_HELD_S = 2.0  # how long one sandbox leaves its signs for the other

_DAEMON = """
import os, time
from probe import *
done()
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.closerange(0, 100)
        while True:
            for name in ("victim", "attack.py", "/tmp/victim"):
                try:
                    open(name, "a").write("poison")
                except OSError:
                    pass
            time.sleep(0.005)
    os._exit(0)
"""
# A host that is killed while it waits for a run; argv: backend, limits as JSON, mark.
_HOST = """
import json, sys
from agentrl.registry import make_sandbox
from agentrl.sandbox import Limits
backend = make_sandbox(sys.argv[1])
backend.sweep()
session = backend.open(Limits(**json.loads(sys.argv[2])))
code = '''
import ctypes, os, sys, time
ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)
os.environ["AGENTRL_MARK"] = sys.argv[1]
for _ in range(3):
    if os.fork() == 0:
        os.setsid()
        ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)
        time.sleep(60)
        os._exit(0)
print("running", flush=True)
time.sleep(60)
'''
def talk(channel):
    channel.receive(100)
    print("running", flush=True)
    channel.receive(100)
session.run(["python3", "-c", code, sys.argv[3]], stdin=talk)
"""


def _poisons_the_next_run(stage: Stage) -> str:
    with stage.sandbox() as session:
        stage.run(session, _DAEMON)
        session.write("victim", b"clean")
        result = session.run(["python3", "-c", "import time; time.sleep(0.5); print(open('victim').read())"])
        return "" if result.stdout == b"clean\n" else f"the next run read {result.stdout[:40]!r}"


def _reads_a_swapped_folder(stage: Stage) -> str:
    read: list[bytes] = []
    with stage.sandbox() as session:
        runner = threading.Thread(target=stage.run, args=(session, SWAPPER))
        runner.start()
        until = time.monotonic() + 1.5
        while time.monotonic() < until:
            try:
                read.append(session.read("shown/id_rsa"))
                session.write("shown/planted", b"x")
            except (OSError, BadConfig):
                time.sleep(0.001)
        runner.join()
    if any(stage.bait.secret.encode() in data for data in read):
        return "the host read the secret through a swapped folder"
    planted = (stage.bait.home / ".ssh" / "planted").exists()
    return "the host wrote through a swapped folder" if planted else ""


def _finds_another_sandbox(stage: Stage) -> str:
    facts = {"sign": secrets.token_hex(8), "seconds": _HELD_S, "locks": True}
    facts["free_port"] = stage.bait.facts["free_port"]
    with stage.sandbox() as first, stage.sandbox() as second:
        leaving = threading.Thread(target=stage.run, args=(first, CHANNELS_LEFT), kwargs={"facts": facts})
        leaving.start()
        time.sleep(_HELD_S / 2)
        result, _ = stage.run(second, CHANNELS_SOUGHT, facts=facts)
        leaving.join()
    return _found(result.stdout, result.stderr)


def _finds_an_earlier_run(stage: Stage) -> str:
    facts = {"sign": secrets.token_hex(8), "seconds": 0, "locks": True, "free_port": 9}
    with stage.sandbox() as first:
        stage.run(first, CHANNELS_LEFT, facts=facts)
    with stage.sandbox() as second:
        result, _ = stage.run(second, CHANNELS_SOUGHT, facts=facts)
    return _found(result.stdout, result.stderr)


def _found(stdout: bytes, stderr: bytes) -> str:
    lines = stdout.decode(errors="replace").splitlines()
    broken = "; ".join(line for line in lines if line.startswith("BROKEN"))
    return broken or ("" if "DONE" in lines else f"it did not end: {stderr[-200:]!r}")


def _survives_its_host(stage: Stage) -> str:
    """The host is killed by SIGKILL in the middle of a run; the next start sweeps."""
    mark = "agentrl-mark-" + secrets.token_hex(8)
    from json import dumps

    limits = {name: getattr(stage.limits(), name) for name in type(stage.limits()).__slots__}
    host = subprocess.Popen(
        [sys.executable, "-c", _HOST, stage.label, dumps({**limits, "wall_s": 60}), mark],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])},
    )
    assert host.stdout is not None
    try:
        begun = host.stdout.readline()
        if not begun:
            return "the second host could not begin"
        host.send_signal(signal.SIGKILL)
        host.wait()
        stage.backend.sweep()
        until = time.monotonic() + 5
        while (left := _left(mark, host.pid)) and time.monotonic() < until:
            time.sleep(0.1)
            stage.backend.sweep()
        return f"after its host's death and a sweep there are {left}" if left else ""
    finally:
        host.kill()
        host.wait()
        host.stdout.close()


def _left(mark: str, host: int) -> str:
    alive = processes_marked(mark)
    paths = sorted(path for path in leftovers(f"-{host}-") if "agentrl" in path)
    return ", ".join([f"{len(alive)} processes"] * bool(alive) + paths[:2])


def _many_at_once(stage: Stage) -> str:
    results: list[str] = []

    def work() -> None:
        try:
            with stage.sandbox() as session:
                results.append(session.run(["true"]).status)
        except SandboxLost as error:
            results.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(_MANY)]
    begun = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(180)
    wrong = [result for result in results if result != "ok"]
    if wrong or len(results) < _MANY:
        return f"{len(wrong)} of {_MANY} were {wrong[:1]}, {_MANY - len(results)} did not end"
    seconds = time.monotonic() - begun
    return "" if seconds < 120 else f"they took {seconds:.0f} s"


def _cancelled_run(stage: Stage) -> str:
    """Closed at many moments, also while it is made; nothing may be left."""
    before = children()
    for delay_s in (0.0, 0.01, 0.03, 0.1, 0.2):
        mark = "agentrl-mark-" + secrets.token_hex(8)
        opened: list[Sandbox] = []

        def work(mark: str = mark, opened: list[Sandbox] = opened) -> None:
            opened.append(stage.backend.open(stage.limits()))
            try:
                opened[0].run(["python3", "-c", "import time; time.sleep(30)", mark])
            except SandboxLost:
                return

        thread = threading.Thread(target=work)
        thread.start()
        while not opened:
            time.sleep(0.001)
        time.sleep(delay_s)
        opened[0].close()
        thread.join(10)
        if thread.is_alive():
            return f"a run went on {delay_s} s after its begin, when it was closed"
        time.sleep(0.05)
        if processes_marked(mark):
            return f"a process survives a close {delay_s} s after its begin"
    more = children() - before
    return "" if len(more) <= 4 else f"{len(more)} more processes"  # what a backend keeps ready


def _ends_at_the_deadline(stage: Stage) -> str:
    for delay_s in (0.40, 0.44, 0.46, 0.48, 0.49, 0.50):
        mark = "agentrl-mark-" + secrets.token_hex(8)
        with stage.sandbox({"wall_s": 0.5}) as session:
            result = session.run(["python3", "-c", f"import time; time.sleep({delay_s})", mark])
            if result.status not in ("ok", "wall") or processes_marked(mark):
                return f"status {result.status} with {len(processes_marked(mark))} survivors"
            if (result.status == "ok") != (result.exit_code == 0):
                return f"status {result.status} with the exit code {result.exit_code}"
    return ""


def _blames_the_world(stage: Stage) -> str:
    """Killing, stopping, exhausting must never look like the world's fault, which would be retried."""
    codes = (
        "import os; os.kill(os.getppid() or 1, 9)",
        "import os; os.kill(1, 9); os.kill(-1, 9)",
        "import os; os.closerange(0, 9999); os._exit(3)",
        "import os\ntry:\n  while True: os.fork()\nexcept OSError: pass\nos.kill(-1, 9)",
        "import os, signal; [os.kill(-1, number) for number in (19, 18, 15, 9)]",
        "import shutil; [shutil.rmtree(folder, ignore_errors=True) for folder in ('/work', '/tmp')]",
    )
    for code in codes:
        with stage.sandbox({"wall_s": 2}) as session:
            try:
                result = session.run(["python3", "-c", code])
            except SandboxLost as error:
                return f"{code!r} is SandboxLost: {error}"
            if result.fault == "world":
                return f"{code!r} is the world's fault"
    return ""


SCENARIOS: tuple[Check, ...] = (
    Check(
        name="a-daemon-poisons-the-next-run",
        group="processes",
        play=_poisons_the_next_run,
        needs=("survivors",),
    ),
    Check(name="swap-a-folder-for-a-link", group="files", play=_reads_a_swapped_folder, needs=("files",)),
    Check(
        name="talk-to-another-sandbox",
        group="isolation",
        play=_finds_another_sandbox,
        needs=("files", "processes", "network"),
    ),
    Check(
        name="find-what-an-earlier-run-left",
        group="isolation",
        play=_finds_an_earlier_run,
        needs=("files", "processes"),
    ),
    Check(name="host-killed-mid-run", group="processes", play=_survives_its_host, needs=("survivors",)),
    Check(name="fifty-at-once", group="resources", play=_many_at_once, needs=("pids",)),
    Check(name="closed-at-any-moment", group="processes", play=_cancelled_run, needs=("survivors",)),
    Check(name="end-at-the-deadline", group="processes", play=_ends_at_the_deadline, needs=("wall_s",)),
    Check(
        name="blame-the-world",
        group="processes",
        play=_blames_the_world,
        needs=("processes", "survivors", "pids"),
    ),
)
