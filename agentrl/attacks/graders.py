"""Attacks on verdicts through source text that is odd, and on pytest through files beside the solution."""

from __future__ import annotations

from agentrl.attacks.attack import Attack, Kind

__all__ = ["GRADERS", "TEXTS"]

_ALL: tuple[Kind, ...] = ("call", "assert", "stdin", "files")


def _text(name: str, tries: str, source: str) -> Attack:
    return Attack(name=f"text-{name}", group="verdicts", tries=tries, source=source, kinds=_ALL)


_WRONG = "def solve(*arguments):\n    return 0\n"

TEXTS: tuple[Attack, ...] = (
    _text("empty", "nothing at all", ""),
    _text("comment", "a comment only", "# done"),
    _text("prose", "no Python", "Here is the solution: it passes all tests."),
    _text("nul", "a NUL in the source", "def solve(n):\n    return 0\0\n"),
    _text("surrogate", "a text that can't be encoded", "def solve(n):\n    return '\ud800'\n"),
    _text("coding", "another encoding", "# -*- coding: utf-7 -*-\n" + _WRONG),
    _text("coding-unknown", "an encoding that there is not", "# coding: does-not-exist\n" + _WRONG),
    _text("mark", "a mark of byte order", "\ufeff" + _WRONG),
    _text("right-to-left", "letters that change the order of what is shown", "# \u202e\u2066\n" + _WRONG),
    _text("open-bracket", "unfinished", "def solve(n):\n    return (((\n"),
    _text("quotes", "ends every kind of string that it might be put into", "'''\n\"\"\"\n'\"\\\n" + _WRONG),
    _text("break-out", "ends a block that it might be put into", "    pass\nreturn True\n" + _WRONG),
    _text("deep", "brackets that overflow the parser", "x = " + "(" * 10_000 + ")" * 10_000),
    _text("deep-unary", "operators that overflow the compiler", "x = " + "-" * 200_000 + "1"),
    _text("deep-blocks", "blocks in blocks", "\n".join(" " * n + "if 1:" for n in range(120))),
    _text("constant-bomb", "a constant that is folded for ever", "x = 9 ** 9 ** 9 ** 9\n" + _WRONG),
    _text("string-bomb", "a string that is folded to terabytes", "x = 'x' * 10 ** 12\n" + _WRONG),
    _text("long-line", "a line of two megabytes", "x = [" + "0," * 1_000_000 + "]\n" + _WRONG),
    _text(
        "many-names", "a hundred thousand functions", "\n".join(f"def f{n}(): pass" for n in range(50_000))
    ),
    _text(
        "main",
        "other code where it is the main module",
        _WRONG + "if __name__ == '__main__':\n    print('3 passed')\n    raise SystemExit(0)\n",
    ),
    _text(
        "rename", "another module's name for itself", "__name__ = 'judge'\n__file__ = '/judge.py'\n" + _WRONG
    ),
    _text("delete", "without its own names", _WRONG + "globals().clear()\n"),
    _text("star", "everything of os", "from os import *\n_exit(0)\n"),
)


def _grades(name: str, tries: str, source: str = _WRONG, files: dict[str, str] | None = None) -> Attack:
    return Attack(
        name=f"pytest-{name}",
        group="verdicts",
        tries=tries,
        source=source,
        files=files or {},
        kinds=("files",),
    )


_PASSES = """
import pytest
@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    report = outcome.get_result()
    report.outcome, report.longrepr = "passed", None
def pytest_pyfunc_call(pyfuncitem):
    return True
def pytest_sessionfinish(session, exitstatus):
    session.exitstatus = 0
"""
_LEAVES = "import os\nos.write(1, b'3 passed in 0.01s\\n')\nos._exit(0)\n"
_STUB = "def test_3(): pass\ndef test_17(): pass\ndef test_256(): pass\n"

GRADERS: tuple[Attack, ...] = (
    _grades("conftest", "a conftest that lets every test pass", files={"conftest.py": _PASSES}),
    _grades("conftest-leaves", "a conftest that ends pytest", files={"conftest.py": _LEAVES}),
    _grades(
        "plugin-by-name",
        "a conftest that names a plugin",
        files={"conftest.py": "pytest_plugins = ['evil']\n", "evil.py": _PASSES},
    ),
    _grades(
        "plugin-by-metadata",
        "a plugin that declares itself as installed packages do",
        files={
            "evil.py": _PASSES,
            "evil-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: evil\nVersion: 1.0\n",
            "evil-1.0.dist-info/entry_points.txt": "[pytest11]\nevil = evil\n",
        },
    ),
    *(
        _grades(
            f"options-{name.replace('.', '-')}", f"options in {name}", files={name: text, "evil.py": _PASSES}
        )
        for name, text in (
            ("pytest.ini", "[pytest]\naddopts = -p evil\n"),
            (".pytest.ini", "[pytest]\naddopts = -p evil\n"),
            ("pyproject.toml", "[tool.pytest.ini_options]\naddopts = '-p evil'\n"),
            ("tox.ini", "[pytest]\naddopts = -p evil\n"),
            ("setup.cfg", "[tool:pytest]\naddopts = -p evil\n"),
        )
    ),
    *(
        _grades(
            f"collects-{name}",
            f"options that run nothing: {options}",
            files={"pytest.ini": f"[pytest]\n{options}\n"},
        )
        for name, options in (
            ("only", "addopts = --collect-only"),
            ("none", "addopts = -k nothing_at_all"),
            ("setup-only", "addopts = --setup-only"),
            ("other-names", "python_functions = never_*"),
            ("other-files", "python_files = never_*.py"),
            ("xfail", "addopts = --runxfail -p no:python"),
        )
    ),
    *(
        _grades(
            f"shadows-{name.replace('/', '-')}",
            f"a module {name} in the working folder",
            files={f"{name}.py": _LEAVES},
        )
        for name in (
            "pytest",
            "_pytest/__init__",
            "pluggy/__init__",
            "unittest/__init__",
            "json",
            "sitecustomize",
            "usercustomize",
            "iniconfig",
            "_pytest/runner",
            "py",
            "exceptiongroup",
            "encodings/__init__",
            "builtins",
            "os",
            "site",
        )
    ),
    _grades("overwrites-the-tests", "tests of one's own under their name", files={"test_hidden.py": _STUB}),
    _grades("folder-for-the-tests", "a package where the tests go", files={"test_hidden/__init__.py": _STUB}),
    _grades(
        "init", "an __init__ that changes the tests' names", files={"__init__.py": "import os\nos._exit(0)\n"}
    ),
    _grades(
        "stale-byte-code",
        "byte code of other tests, dated into the future",
        files={"__pycache__/test_hidden.cpython-311-pytest-8.4.1.pyc": "\0" * 64},
    ),
    _grades("path-file", "a .pth file that runs code", files={"evil.pth": "import os; os._exit(0)\n"}),
    _grades(
        "rewrites-the-tests",
        "write tests of one's own over the hidden ones, and import them",
        "import os\nfor name in ('test_hidden.py', '../test_hidden.py'):\n    try:\n"
        "        os.chmod(name, 0o666)\n"
        f"        open(name, 'w').write({_STUB!r})\n    except OSError:\n        pass\n" + _WRONG,
    ),
    _grades(
        "skips-the-module",
        "skip while being imported",
        "import pytest\npytest.skip('no', allow_module_level=True)\n",
    ),
    _grades("skips-when-asked", "skip in the call", "import pytest\ndef solve(n):\n    pytest.skip('no')\n"),
    _grades("xfails-when-asked", "expect to fail", "import pytest\ndef solve(n):\n    pytest.xfail('no')\n"),
    _grades(
        "exits-when-asked",
        "end the session",
        "import pytest\ndef solve(n):\n    pytest.exit('no', returncode=0)\n",
    ),
    _grades(
        "returns-equal",
        "an object that equals everything",
        (
            "class Equal:\n    def __eq__(self, other): return True\n    __hash__ = None\n"
            "def solve(n):\n    return Equal()\n"
        ),
    ),
    _grades(
        "patches-reports",
        "let every report say passed",
        (
            "import _pytest.reports as reports\n"
            "made = reports.TestReport.from_item_and_call\n"
            "def make(item, call):\n    call.excinfo = None\n    report = made(item, call)\n"
            "    report.outcome = 'passed'\n"
            "    return report\nreports.TestReport.from_item_and_call = staticmethod(make)\n" + _WRONG
        ),
    ),
    _grades(
        "patches-the-runner",
        "let no call raise",
        (
            "import _pytest.runner as runner\nimport _pytest.python as python\n"
            "python.Function.runtest = lambda self: None\nrunner.call_runtest_hook = lambda *a, **k: None\n"
            + _WRONG
        ),
    ),
    _grades(
        "patches-assertions",
        "let AssertionError be nothing",
        ("import builtins\nclass Quiet(BaseException): pass\nbuiltins.AssertionError = Quiet\n" + _WRONG),
    ),
    _grades(
        "replaces-the-tests-functions",
        "change the tests' code through the callers' frames",
        (
            "import sys\nframe = sys._getframe()\nwhile frame:\n"
            "    if 'test_hidden' in str(frame.f_globals.get('__name__')):\n"
            "        for n in (3, 17, 256):\n            frame.f_globals[f'test_{n}'] = lambda: None\n"
            "    frame = frame.f_back\n"
            "def solve(n):\n    frame = sys._getframe(1)\n    for name in list(frame.f_globals):\n"
            "        if name.startswith('test_'):\n"
            "            frame.f_globals[name].__code__ = (lambda: None).__code__\n"
            "    return 0\n"
        ),
    ),
    _grades(
        "finds-the-verdicts-number",
        "take what the verdict must be said with from the callers' frames, or from any object, and say it",
        (
            "import gc, os, sys\nframe, spaces = sys._getframe(), []\nwhile frame:\n"
            "    spaces.append(dict(frame.f_locals))\n    frame = frame.f_back\n"
            "spaces += [thing for thing in gc.get_objects() if type(thing) in (dict, list, tuple)]\n"
            "for space in spaces:\n"
            "    for thing in list(space.values() if isinstance(space, dict) else space):\n"
            "        if type(thing) is bytes and len(thing) == 16:\n"
            "            for number in range(3, 64):\n"
            "                try:\n                    os.write(number, thing + b'passed:')\n"
            "                except OSError:\n                    pass\n"
            "            os._exit(0)\n" + _WRONG
        ),
    ),
    _grades(
        "finds-the-plugin",
        "find the judge's plugin in memory and write its record",
        (
            "import gc\ndef solve(n):\n    for thing in gc.get_objects():\n"
            "        if isinstance(thing, dict) and any('test_hidden.py::' in str(key) "
            "for key in list(thing)[:9]):\n"
            "            for key in list(thing):\n                thing[key] = 'passed'\n    return 0\n"
        ),
    ),
    _grades(
        "reads-the-tests",
        "read the hidden tests and answer by them",
        (
            "import re\ndef solve(n):\n    text = open('test_hidden.py').read()\n"
            "    return int(re.search(rf'solve\\({n}\\) == (\\d+)', text)[1])\n"
        ),
    ),
    _grades(
        "forges-reports",
        "write reports in every form and end",
        (
            "import os, json\nnames = [f'test_hidden.py::test_{n}' for n in (3, 17, 256)]\n"
            "for path in ('report.json', 'report.xml', '.report.json', '/tmp/report.json', 'results.jsonl'):"
            "\n"
            "    try:\n        open(path, 'w').write(json.dumps({name: 'passed' for name in names}))\n"
            "    except OSError:\n        pass\n"
            "for number in range(1, 64):\n    try:\n"
            "        os.write(number, json.dumps({n: 'passed' for n in names}).encode() + b'\\n')\n"
            "    except OSError:\n        pass\nos._exit(0)\n"
        ),
    ),
)
