"""Working directories: nothing that is arranged inside keeps one from being removed."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from agentrl.sandboxing.beneath import remove_all

_AS_AN_ORDINARY_USER = """
import os, sys
from pathlib import Path
from agentrl.sandboxing.workdirs import WorkDir
base = Path(os.environ["TMPDIR"])
(base / "outside").mkdir()
(base / "outside" / "kept").write_text("x")
if os.geteuid() == 0:
    for path in (base, base / "outside", base / "outside" / "kept"):
        os.chown(path, 4242, 4242)
    os.setgroups([]); os.setgid(4242); os.setuid(4242)
work = WorkDir("bubblewrap", size_mib=None, owner=None)
os.chdir(work.path)
"""
_ARRANGED = {
    "depth": "for _ in range(1100):\n    os.mkdir('d'); os.chdir('d'); os.symlink(base / 'outside', 'link')",
    "modes": "os.makedirs('a/b/c'); open('a/b/c/x', 'w').close()\n"
    "os.chmod('a/b/c', 0); os.chmod('a/b', 0o1000); os.chmod('a', 0o555); os.chmod('.', 0)",
    "kinds": "os.mkfifo('pipe'); os.symlink('.', 'here'); os.symlink(base / 'outside', 'out')\n"
    "open(b'\\xff\\n', 'w').close(); os.link(base / 'outside' / 'kept', 'hard')",
}


_REMOVED = """
os.chdir("/")
work.remove()
work.remove()
print(os.listdir(base / f"agentrl-{os.geteuid()}"))
"""


def test_whatever_an_ordinary_user_s_sandbox_arranged_is_removed_and_nothing_else() -> None:
    for arranged in _ARRANGED.values():
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run(
                [sys.executable, "-c", f"{_AS_AN_ORDINARY_USER}\n{arranged}\n{_REMOVED}"],
                env={**os.environ, "TMPDIR": folder},
                capture_output=True,
                text=True,
                timeout=120,
            )
            assert (done.stdout, done.stderr) == ("[]\n", "")
            assert [path.name for path in Path(folder, "outside").iterdir()] == ["kept"]
            assert Path(folder, "outside", "kept").stat().st_nlink == 1


def test_two_that_remove_the_same_both_get_on(tmp_path: Path) -> None:
    for number in range(100):
        folder = tmp_path / "it" / str(number % 20) / str(number) / "a" / "b"
        folder.mkdir(parents=True)
        (folder / "file").touch()
    threads = [threading.Thread(target=remove_all, args=(tmp_path / "it",)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not (tmp_path / "it").exists()
