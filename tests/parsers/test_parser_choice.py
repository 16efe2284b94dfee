"""The parser that a template or a name chooses."""

from __future__ import annotations

import pytest

from agentrl.errors import UnknownName, UnsupportedModel
from agentrl.parsers import detect_parser, get_parser

SNIPPETS = [
    ("hermes", "{{ m }}"),
    ("hermes", 'tools <tool_call>\\n{\\"name\\": <function-name>'),
    ("hermes", "tools <tool_call>\n{'name'"),
    ("hermes", 'tools <tool_call>{{ {"name": x} }}'),
    ("qwen3_xml", "tools <tool_call>\\n<function=example_function_name>\\n<parameter=example_parameter_1>"),
    ("qwen3_xml", "tools '\\n<tool_call>\\n<function=' + tool_call.name + '>\\n' '<parameter=' + args_name"),
    ("mistral", "tools '[TOOL_CALLS] [' tool_call.function|tojson"),
    ("mistral", "tools '[TOOL_CALLS]' + call.function.name + '[ARGS]'"),
    ("deepseek_v3", "tools '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>'"),
    ("llama3_json", """tools '{"name": "' + tool_call.name + '", ' '"parameters": ' <|python_tag|>"""),
    ("llama3_json", 'tools Respond in the format {"name": function name, "parameters": dictionary}'),
    ("llama3_json", 'tools "{\\"name\\": function name, \\"parameters\\": dictionary}"'),
    ("pythonic", "tools [func_name1(params_name1=params_value1), func_name2(params)]"),
    ("pythonic", "tools {{- tool_call.name + '(' -}}"),
]


@pytest.mark.parametrize(("name", "template"), SNIPPETS)
def test_the_format_is_found_in_the_template(name: str, template: str) -> None:
    assert detect_parser(template) == name


@pytest.mark.parametrize(
    "template", ["tools <tool_call>\n<function=name>", "tools <|python_tag|>", "tools <start_function_call>"]
)
def test_a_template_with_another_format_is_refused_and_the_known_ones_are_named(template: str) -> None:
    with pytest.raises(
        UnsupportedModel, match=r"no parser here reads; there is: deepseek_v3, hermes, llama3"
    ):
        detect_parser(template)


@pytest.mark.parametrize(
    ("wrong", "meant"), [("hermis", "hermes"), ("llama3", "llama3_json"), ("qwen3xml", "qwen3_xml")]
)
def test_a_parser_that_is_not_there_is_refused_by_name(wrong: str, meant: str) -> None:
    with pytest.raises(UnknownName, match=rf"'{wrong}'; did you mean '{meant}'\?; there is: deepseek_v3, "):
        get_parser(wrong)


def test_qwen3_coder_is_another_name_of_qwen3_xml() -> None:
    assert type(get_parser("qwen3_coder")) is type(get_parser("qwen3_xml"))
