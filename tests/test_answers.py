import pytest

from agentrl.answers import boxed_answers, shortened, truth_of, visible_text
from agentrl.errors import BadData
from agentrl.types import Task


@pytest.mark.parametrize(
    ("text", "boxes"),
    [
        (r"so \boxed{18}.", ("18",)),
        (r"\boxed{\frac{1}{2}} and \boxed { 3 }", (r"\frac{1}{2}", "3")),
        (r"\boxed{\{1, 2\}}", (r"\{1, 2\}",)),
        (r"\boxed{\boxed{3}}", (r"\boxed{3}",)),
        (r"\boxed{", ()),
        (r"an open \boxed{ hides nothing: \boxed{3}", ("3",)),
        (r"} stray braces } \boxed{4}", ("4",)),
        (r"\\boxed{4}", ()),
        ("no box", ()),
    ],
)
def test_closed_boxes_are_found_in_order_with_balanced_braces(text: str, boxes: tuple[str, ...]) -> None:
    assert boxed_answers(text) == boxes


@pytest.mark.parametrize(
    "text",
    [
        r"<think>\boxed{1}</think> none",
        r"\boxed{1}</think> the template opened the thinking",
        r"<think> cut off while thinking \boxed{1}",
        r"said \boxed{1} <think>then thought again</think> none",
    ],
)
def test_a_box_in_thinking_or_before_it_does_not_count(text: str) -> None:
    assert boxed_answers(text) == ()


def test_what_follows_the_thinking_is_visible() -> None:
    assert visible_text("<think>a</think>b<think>c</think>d") == "d"
    assert visible_text("plain") == "plain"


@pytest.mark.parametrize(
    "hostile", [r"\boxed{" * 200_000, "{" * 1_000_000, r"\boxed{1}" * 100_000, "\\" * 1_000_001]
)
def test_hostile_texts_take_one_pass(hostile: str) -> None:
    assert len(set(boxed_answers(hostile))) <= 1


def test_a_missing_truth_names_what_there_is() -> None:
    task = Task(id="t", prompt=(), truth={"solution": 1})
    with pytest.raises(BadData, match="'t' has no truth 'answer'.*'solution'"):
        truth_of(task, "answer")


def test_a_note_quotes_only_the_beginning_of_a_long_text() -> None:
    assert shortened("a" * 100, 5) == "'aaaaa...'"
