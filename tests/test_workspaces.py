"""The text form of workspace tasks: what is read, which tests are found, that nothing is dropped unseen."""

from __future__ import annotations

import pytest

from agentrl.errors import BadData
from agentrl.workspaces import MOST_WRITTEN, parse_workspaces

ONE = """##### one train
=== about
Mend it.
=== file a.py
def f():
    return 1
=== gold a.py
def f():
    return 2
=== hidden test_a.py
from a import f
def test_f():
    assert f() == 2
"""


def refusal(text: str) -> str:
    with pytest.raises(BadData) as raised:
        parse_workspaces(text, "tasks.txt")
    return str(raised.value)


def names(hidden: str) -> tuple[str, ...]:
    (task,) = parse_workspaces(ONE + hidden, "tasks.txt")
    return task.test_names()["test_a.py"]


def test_a_task_is_read_with_its_texts_as_they_stand() -> None:
    one, two = parse_workspaces(ONE + ONE.replace("one train", "two.b-c dev "), "tasks.txt")
    assert (one.name, one.split, one.about) == ("one", "train", "Mend it.")
    assert one.files == {"a.py": "def f():\n    return 1\n"}
    assert one.gold == {"a.py": "def f():\n    return 2\n"}
    assert one.test_names() == {"test_a.py": ("test_f",)}
    assert (two.name, two.split) == ("two.b-c", "dev")


def test_lines_that_only_look_like_marks_are_text() -> None:
    text = ONE.replace("=== gold", "Title\n=====\n===\n######\n\x0c#####x\n=== gold", 1).replace(
        "a.py", "a.txt"
    )
    (task,) = parse_workspaces(text, "tasks.txt")
    assert task.files["a.txt"].endswith("Title\n=====\n===\n######\n\x0c#####x\n")


@pytest.mark.parametrize(
    ("line", "number"),
    [
        ("=== hiden x", 4),
        ("=== file my file.py", 4),
        ("=== file", 4),
        ("=== file ", 4),
        ("===\tfile b.py", 4),
        ("=== about x", 4),
        ("##### two words train", 4),
        ("##### two", 4),
        ("##### a/b train", 4),
    ],
)
def test_a_mark_with_a_mistake_is_refused_with_its_line(line: str, number: int) -> None:
    said = refusal(ONE.replace("=== file", f"{line}\nx = 1\n=== file", 1))
    assert said.startswith(f"tasks.txt, line {number}: {line.strip()!r} begins no task and no section: ")
    assert "'##### NAME SPLIT'" in said
    assert "PATH without blanks" in said


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("##### one", "# mine\n##### one", "line 1: it begins with '##### NAME SPLIT', .* not '# mine'"),
        ("=== about", "lost\n=== about", "line 2: 'lost' stands in no section"),
        ("=== gold", "=== file a.py\n=== gold", "line 7: task 'one' has '=== file a.py' twice"),
        ("=== file", "=== about\n=== file", "line 4: task 'one' has '=== about' twice"),
        ("=== file a.py", "=== file ../a.py", "line 4: task 'one': .* names no file"),
        (
            "=== gold",
            "=== file a.py/b.py\n=== gold",
            "task 'one': 'a.py/b.py' lies in 'a.py', which is a file",
        ),
        ("hidden test_a.py", "hidden a.py/test_a.py", "'a.py/test_a.py' lies in 'a.py'"),
        ("=== gold a.py", "=== gold b.py", "'=== gold b.py' is of no file that is there.* a.py"),
        ("return 2", "return 1", "task 'one': its gold is what its files are already"),
        ("return 2", f"return {'2' * MOST_WRITTEN}", f"262\\d\\d\\d bytes, .* at most {MOST_WRITTEN}"),
        ("return 2", "return (", "'=== gold a.py', its line 2: no Python"),
        ("def test_f", "def (test_f", "task 'one': '=== hidden test_a.py', its line 2: no Python"),
        ("== 2", "== 2\0", "'=== hidden test_a.py'.* no Python"),
        ("def test_f", "def check_f", "there is no test in test_a.py: write functions 'test_...'"),
    ],
)
def test_what_would_be_dropped_or_crash_later_is_refused(old: str, new: str, said: str) -> None:
    with pytest.raises(BadData, match=f"^tasks.txt, (line 1: task 'one': )?.*{said}"):
        parse_workspaces(ONE.replace(old, new, 1), "tasks.txt")


def test_two_tasks_of_one_name_and_none_at_all_are_refused() -> None:
    assert "line 14: a second task 'one', after that of line 1" in refusal(ONE + ONE)
    assert "tasks.txt: it is empty" in refusal("\n")


def test_tests_in_classes_are_found_as_pytest_finds_them() -> None:
    found = names(
        "import unittest, pytest\n"
        "@pytest.fixture\ndef test_data(): pass\n"
        "class Checks:\n    def test_kept(self): pass\n    def test_changed(self): pass\n"
        "class TestX(Checks):\n    def test_changed(self): pass\n    def helper(self): pass\n"
        "    class TestInner:\n        def test_deep(self): pass\n"
        "class TestHelper:\n    def __init__(self): pass\n"
        "class TestOff:\n    __test__ = False\n    def test_off(self): pass\n"
        "class Case(unittest.TestCase):\n    def testCamel(self): pass\n"
        "class Later(unittest.IsolatedAsyncioTestCase):\n    async def test_later(self): pass\n"
    )
    assert set(found) == {
        "test_f",
        "TestX::test_kept",
        "TestX::test_changed",
        "TestX::TestInner::test_deep",
        "Case::testCamel",
        "Later::test_later",
    }


@pytest.mark.parametrize(
    ("hidden", "said"),
    [
        ("def test_f(): pass", "its line 4: test_f stands there twice, first in line 2"),
        ("class TestX:\n    def test_a(self): pass\n    def test_a(self): pass", "test_a stands there twice"),
        ("async def test_more(): pass", "its line 4: test_more is a coroutine"),
        ("class TestX:\n    async def test_a(self): pass", "test_a is a coroutine"),
        (
            "class TestX:\n    def __init__(self): pass\n    def test_a(self): pass",
            "TestX has .* an __init__",
        ),
        ("class Checks:\n    def test_a(self): pass", "Checks has tests, but not the name"),
        ("class TestX(other.Checks): pass", "TestX may inherit tests of Checks"),
        ("@pytest.mark.parametrize('x', [1, 2])\ndef test_more(x): pass", "test_more is parametrized"),
        ("if f():\n    def test_more(): pass", "test_more stands inside of another statement"),
        ("class TestX:\n    if f():\n        def test_a(self): pass", "test_a stands inside of another"),
    ],
)
def test_a_test_that_would_go_unjudged_is_refused(hidden: str, said: str) -> None:
    with pytest.raises(BadData, match=f"task 'one': '=== hidden test_a.py', .*{said}"):
        parse_workspaces(f"{ONE}{hidden}\n", "tasks.txt")
