"""What every backend promises, as checks that any third party's can be put to: see ``agentrl.sandbox``.

A check returns "" where the promise holds, else what is wrong.
"""

from __future__ import annotations

import json
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from agentrl.attacks.stage import Stage
from agentrl.errors import AgentRLError, BadConfig
from agentrl.sandbox import Channel, ExecResult, Sandbox, SandboxLost

__all__ = ["CONTRACT", "Check", "NotEnforced"]


class NotEnforced(AgentRLError):
    """Raised by a check that finds that what it tries was never promised."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One promise: a sentence, what it needs of LIMITS and GUARANTEES, and how it is tried."""

    name: str
    play: Callable[[Stage], str]
    needs: tuple[str, ...] = ()
    group: str = "contract"


def _differs(result: ExecResult, **expected: Any) -> str:
    wrong = {
        name: getattr(result, name) for name, value in expected.items() if getattr(result, name) != value
    }
    return f"{wrong} instead of { ({name: expected[name] for name in wrong}) }" if wrong else ""


def _code(stage: Stage) -> str:
    with stage.sandbox() as session:
        result = session.run(["python3", "-c", "import sys; print(6 * 7); sys.exit(3)"])
    return _differs(
        result, status="error", fault="policy", exit_code=3, stdout=b"42\n", stderr=b"", truncated=0
    )


def _success(stage: Stage) -> str:
    with stage.sandbox() as session:
        result = session.run(["python3", "-c", "pass"])
    return _differs(result, status="ok", fault="none", exit_code=0, signal=None, stdout=b"", truncated=0)


def _echo(stage: Stage) -> str:
    data = bytes(range(256)) * 100
    with stage.sandbox() as session:
        result = session.run(["cat"], stdin=data)
    return _differs(result, status="ok", stdout=data)


def _errors(stage: Stage) -> str:
    with stage.sandbox() as session:
        result = session.run(["sh", "-c", "echo out; echo err >&2"])
    return _differs(result, status="ok", stdout=b"out\n", stderr=b"err\n")


def _killed(stage: Stage) -> str:
    with stage.sandbox() as session:
        result = session.run(["python3", "-c", "import os; os.kill(os.getpid(), 9)"])
    return _differs(result, status="signal", fault="policy", signal=9)


def _unknown(stage: Stage) -> str:
    with stage.sandbox() as session:
        result = session.run(["no-such-program"])
    return _differs(result, status="error", fault="policy", exit_code=127)


def _environment(stage: Stage) -> str:
    code = "import json, os; print(json.dumps([dict(os.environ), os.getcwd()]))"
    with stage.sandbox() as session:
        variables, folder = json.loads(session.run(["python3", "-c", code]).stdout)
    more = {*variables} - {"PATH", "HOME", "LANG", "TMPDIR", "LC_CTYPE", "PWD", "SHLVL", "_"}
    if more or not {"PATH", "HOME", "LANG", "TMPDIR"} <= {*variables}:
        return f"the variables are {sorted(variables)}"
    if stage.survey.missing.get("files") is None and (folder, variables["HOME"]) != ("/work", "/work"):
        return f"it runs in {folder}, and HOME is {variables['HOME']}"
    return ""


def _persists(stage: Stage) -> str:
    with stage.sandbox() as session:
        session.run(["sh", "-c", "cat a/b > c"], files={"a/b": b"kept\0\xff"})
        session.write("d/e", b"later")
        result = session.run(["cat", "c", "d/e"])
        read = session.read("c")
    return _differs(result, stdout=b"kept\0\xfflater") or ("" if read == b"kept\0\xff" else f"read {read!r}")


def _writable(stage: Stage) -> str:
    with stage.sandbox() as session:
        script = "echo more >> given && echo x > folder/y && mkdir z && rm given && echo t > $TMPDIR/t"
        result = session.run(["sh", "-c", script], files={"given": b"1", "folder/x": b"2"})
        session.run(["chmod", "+x", "folder/x"])
        session.write("folder/x", b"#!/bin/sh\nexit 3\n")  # and stays executable
        again = session.run(["folder/x"])
    return _differs(result, status="ok", stderr=b"") or _differs(again, exit_code=3)


def _fresh(stage: Stage) -> str:
    with stage.sandbox() as first, stage.sandbox() as second:
        first.write("left", b"x")
        first.run(["sh", "-c", "echo x > $TMPDIR/left; echo x > also"])
        result = second.run(["sh", "-c", "ls; ls $TMPDIR"])
    return "" if b"left" not in result.stdout and b"also" not in result.stdout else "another session's files"


def _bad_names(stage: Stage) -> str:
    with stage.sandbox() as session:
        for name in ("", "/etc/passwd", "../x", "a/../b", "a\0b", "a\nb", "a//b", "./a", "x" * 5000):
            for work in (
                lambda name=name: session.read(name),
                lambda name=name: session.write(name, b"x"),
                lambda name=name: session.run(["true"], files={name: b"x"}),
            ):
                try:
                    work()
                except BadConfig:
                    continue
                return f"the name {name[:40]!r} was not refused"
    return ""


def _reads(stage: Stage) -> str:
    with stage.sandbox() as session:
        session.run(
            ["sh", "-c", "ln -s /etc/passwd link; mkfifo pipe; mkdir folder; head -c 2000 /dev/zero > big"]
        )
        for name in ("none", "link", "pipe", "folder", "folder/none"):
            try:
                session.read(name)
            except FileNotFoundError:
                continue
            return f"{name} was read"
        try:
            session.read("big", most_bytes=1999)
        except OSError:
            return "" if session.read("big", most_bytes=2000) == bytes(2000) else "a file came changed"
    return "a file beyond most_bytes was read"


def _overwrites_links(stage: Stage) -> str:
    with stage.sandbox() as session:
        session.run(["sh", "-c", f"ln -s {stage.bait.home}/.netrc link; ln -s {stage.bait.home} folder"])
        session.write("link", b"ours")
        try:
            session.write("folder/planted", b"x")
        except OSError:
            pass
        else:
            if (stage.bait.home / "planted").exists():
                return "a file was written through a link"
        return "" if session.read("link") == b"ours" and not stage.bait.missing() else "a link was followed"


def _in_the_way(stage: Stage) -> str:
    with stage.sandbox() as session:
        session.run(["mkdir", "given"])
        result = session.run(["true"], files={"given": b"1"})
        written = _writes(session, "given")
        after = session.run(["true"], files={"another": b"1"})
    return _differs(result, status="error", fault="policy", exit_code=126) or written or _differs(after)


def _no_room(stage: Stage) -> str:
    for code in ("open('big', 'wb').write(bytes(64 << 20))", "n = 0\nwhile True: os.mkdir(str(n)); n += 1"):
        with stage.sandbox() as session:
            session.run(["python3", "-c", f"import os\n{code}"])
            result = session.run(["true"], files={"given": bytes(1 << 16)})
            if wrong := _differs(result, status="error", fault="policy", exit_code=126):
                return wrong
            if written := _writes(session, "given"):
                return written
    return ""


def _writes(session: Sandbox, name: str) -> str:
    try:
        session.write(name, bytes(1 << 16))
    except OSError:
        return ""
    return "a file was written where none can be"


# An access control list, version 2, whose owner may do nothing.
_ACL = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", tag, 0, 0xFFFFFFFF) for tag in (1, 4, 16, 32))


def _locked(stage: Stage) -> str:
    acl = (
        "import os\nfor kind in ('default', 'access'):\n    try: os.setxattr('.', 'system.posix_acl_' + kind"
    )
    scripts = ("os.chmod('.', 0)", "os.chmod('.', 0o1000)", f"{acl}, {_ACL!r})\n    except OSError: pass")
    for script in scripts:
        with stage.sandbox() as session:
            session.run(["python3", "-c", f"import os\nopen('kept', 'w').write('x')\n{script}"])
            read = session.read("kept")
            session.run(["python3", "-c", f"import os\n{script}"])
            session.write("later", b"y")
            session.run(["python3", "-c", f"import os\n{script}"])
            result = session.run(["sh", "-c", "cat kept; ls"], files={"given": b"z"})
        if read != b"x" or result.stdout != b"xgiven\nkept\nlater\n":
            return f"after {script} a run ended so: {result}"
    return ""


def _odd_words(stage: Stage) -> str:
    with stage.sandbox() as session:
        for word in ("a\0b", "\0", "\ud800"):
            for argv in (["sh", "-c", f"echo {word}"], [word]):
                result = session.run(argv)
                if wrong := _differs(result, status="error", fault="policy", exit_code=127):
                    return f"{argv!r}: {wrong}"
    return ""


def _streams_by_name(stage: Stage) -> str:
    code = "open('/dev/stdout', 'w').write(open('/dev/stdin').read()); open('/dev/stderr', 'w').write('e')"
    with stage.sandbox() as session:
        result = session.run(["python3", "-c", code], stdin=b"in")
    return _differs(result, status="ok", stdout=b"in", stderr=b"e")


def _wall(stage: Stage) -> str:
    with stage.sandbox({"wall_s": 1}) as session:
        begun = time.monotonic()
        result = session.run(["sleep", "30"])
        seconds = time.monotonic() - begun
    slow = f"it took {seconds:.1f} s" if seconds > 5 or not 900 < result.wall_ms < 2500 else ""
    return _differs(result, status="wall", fault="policy", signal=9, exit_code=None) or slow


def _cpu(stage: Stage) -> str:
    with stage.sandbox({"cpu_s": 0.5, "wall_s": 60}) as session:
        result = session.run(["python3", "-c", "while True: pass"])
    wrong = f"{result.cpu_ms:.0f} ms were counted" if not 400 < result.cpu_ms < 1500 else ""
    return _differs(result, status="cpu", fault="policy") or wrong


def _memory(stage: Stage) -> str:
    with stage.sandbox({"cpu_s": 20, "wall_s": 60}) as session:  # a slow host fills it slowly
        result = session.run(["python3", "-c", "x = bytearray(300 << 20); x[::4096] = bytes(len(x[::4096]))"])
        after = session.run(["python3", "-c", "print('alive')"])
    return _differs(result, status="memory", fault="policy") or _differs(
        after, status="ok", stdout=b"alive\n"
    )


def _peak(stage: Stage) -> str:
    code = "import time; x = bytearray(60 << 20); x[::4096] = bytes(len(x[::4096])); time.sleep(0.2)"
    with stage.sandbox() as session:
        result = session.run(["python3", "-c", code])
    wrong = (
        f"the peak is {result.peak_bytes >> 20} MiB" if not 58 << 20 < result.peak_bytes < 129 << 20 else ""
    )
    return _differs(result, status="ok") or wrong


def _pids(stage: Stage) -> str:
    code = "import os, time\nfor _ in range(100):\n  if os.fork() == 0: time.sleep(9); os._exit(0)"
    with stage.sandbox() as session:
        result = session.run(["python3", "-c", code])
        after = session.run(["python3", "-c", "print('alive')"])
    flagged = "" if "pids_hit" in result.flags else f"no flag pids_hit in {result.flags}"
    return _differs(result, status="error") or flagged or _differs(after, stdout=b"alive\n")


def _disk(stage: Stage) -> str:
    with stage.sandbox() as session:
        result = session.run(["sh", "-c", "head -c 64000000 /dev/zero > big; wc -c < big"])
        size = int(result.stdout or 0)
    return "" if size < 40 << 20 else f"{size >> 20} MiB were written, with a limit of 16"


def _output(stage: Stage) -> str:
    with stage.sandbox({"output_kib": 1}) as session:
        some = session.run(["sh", "-c", "printf A; head -c 5000 /dev/zero; printf Z"])
        endless = session.run(["cat", "/dev/zero"])
    ends = "" if (some.stdout[:1], some.stdout[-1:]) == (b"A", b"Z") else "head and tail were not kept"
    return (
        _differs(some, status="ok", truncated=5002 - 1024)
        or ends
        or _differs(endless, status="output", fault="policy")
    )


def _cpu_is_told(stage: Stage) -> str:
    code = "import time\nwhile time.process_time() < 0.6: pass"
    with stage.sandbox() as session:
        result = session.run(["python3", "-c", code])
    return _differs(result, status="ok") or (
        "" if 550 < result.cpu_ms < 1200 else f"{result.cpu_ms:.0f} ms of CPU time were told of 600"
    )


def _talk(stage: Stage) -> str:
    heard = []

    def talk(channel: Channel) -> None:
        for word in (b"one\n", b"two\n"):
            channel.send(word)
            heard.append(channel.receive(100))

    with stage.sandbox() as session:
        result = session.run(["cat"], stdin=talk)
    return _differs(result, status="ok", fault="none") or (
        "" if heard == [b"one\n", b"two\n"] else f"heard {heard}"
    )


def _talk_gone(stage: Stage) -> str:
    heard = []

    def talk(channel: Channel) -> None:
        while True:  # until Gone
            heard.append(channel.receive(100))

    with stage.sandbox() as session:
        result = session.run(["sh", "-c", "echo last words; exit 4"], stdin=talk)
    return _differs(result, status="error", exit_code=4) or (
        "" if b"".join(heard) == b"last words\n" else f"heard {heard}"
    )


def _talk_raises(stage: Stage) -> str:
    def talk(channel: Channel) -> None:
        raise ZeroDivisionError

    with stage.sandbox() as session:
        try:
            session.run(["sleep", "30"], stdin=talk)
        except ZeroDivisionError:
            return _differs(session.run(["echo", "on"]), stdout=b"on\n")
    return "what a talk raised did not come out"


def _lower(stage: Stage) -> str:
    with stage.sandbox() as session:
        lower = session.run(["sleep", "30"], limits=stage.limits({"wall_s": 0.5}))
        try:
            session.run(["true"], limits=stage.limits({"wall_s": 1000}))
        except BadConfig:
            return _differs(lower, status="wall")
    return "a run had more than its sandbox"


def _closed(stage: Stage) -> str:
    session = stage.backend.open(stage.limits())
    session.close()
    session.close()
    for work in (lambda: session.run(["true"]), lambda: session.read("x"), lambda: session.write("x", b"")):
        try:
            work()
        except SandboxLost:
            continue
        return "a closed sandbox was of use"
    return ""


def _closed_meanwhile(stage: Stage) -> str:
    session = stage.backend.open(stage.limits())
    timer = threading.Timer(0.5, session.close)
    begun = time.monotonic()
    timer.start()
    try:
        result = session.run(["sleep", "30"])
    except SandboxLost:
        return ""
    finally:
        timer.join()
        seconds = time.monotonic() - begun
    return _differs(result, status="lost", fault="world") or (
        "" if seconds < 5 else f"it took {seconds:.1f} s"
    )


def _at_once(stage: Stage) -> str:
    said: list[bytes] = []

    def work(number: int) -> None:
        with stage.sandbox() as session:
            said.append(session.run(["sh", "-c", f"sleep 0.2; echo {number}"]).stdout)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return "" if sorted(said) == [b"%d\n" % number for number in range(8)] else f"they said {said}"


def _sweeps(stage: Stage) -> str:
    with stage.sandbox() as session:
        stage.backend.sweep()
        return _differs(session.run(["echo", "on"]), stdout=b"on\n")


CONTRACT: tuple[Check, ...] = (
    Check(name="exit code and output are told", play=_code),
    Check(name="exit code 0 is nobody's fault", play=_success),
    Check(name="stdin goes in byte for byte", play=_echo),
    Check(name="stdout and stderr are apart", play=_errors),
    Check(name="a signal is told", play=_killed),
    Check(name="an unknown program is the policy's fault", play=_unknown),
    Check(name="the environment is empty but for four", play=_environment),
    Check(name="files persist in a session", play=_persists),
    Check(name="what the host wrote can be changed inside", play=_writable),
    Check(name="a new session is empty", play=_fresh, needs=("files",)),
    Check(name="names that lead elsewhere are refused", play=_bad_names),
    Check(name="only regular files of bounded size are read", play=_reads),
    Check(name="the host writes through no link", play=_overwrites_links),
    Check(name="what lies where a file goes is the policy's fault", play=_in_the_way),
    Check(name="no room for a file is the policy's fault", play=_no_room, needs=("disk_mib",)),
    Check(name="a working directory can't be locked", play=_locked, needs=("files",)),
    Check(name="words that no program can be given are the policy's fault", play=_odd_words),
    Check(name="stdin, stdout and stderr can be opened by name", play=_streams_by_name),
    Check(name="limit: wall clock", play=_wall, needs=("wall_s",)),
    Check(name="limit: CPU time", play=_cpu, needs=("cpu_s",)),
    Check(name="limit: memory, and life goes on", play=_memory, needs=("memory_mib",)),
    Check(name="limit: processes, and life goes on", play=_pids, needs=("pids", "survivors")),
    Check(name="limit: disk", play=_disk, needs=("disk_mib",)),
    Check(name="limit: output, head and tail kept", play=_output, needs=("output_kib",)),
    Check(name="CPU time is told", play=_cpu_is_told, needs=("cpu_s",)),
    Check(name="the peak of memory is told", play=_peak, needs=("memory_mib",)),
    Check(name="a talk is heard and hears", play=_talk),
    Check(name="a talk is told that the other end is gone", play=_talk_gone),
    Check(name="what a talk raises comes out", play=_talk_raises),
    Check(name="a run's limits are at most its sandbox's", play=_lower, needs=("wall_s",)),
    Check(name="a closed sandbox is lost", play=_closed),
    Check(name="closing ends a run", play=_closed_meanwhile),
    Check(name="eight sandboxes at once", play=_at_once),
    Check(name="sweeping spares what lives", play=_sweeps),
)
