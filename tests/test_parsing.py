"""Damaged JSON and YAML is a ValueError."""

from pathlib import Path

import pytest

from sinklm.parsing import named_damage, parse_json, parse_yaml

DEEP = "[" * 100_000


@pytest.mark.parametrize("parse", [parse_json, parse_yaml])
def test_damaged_text_is_a_value_error(parse):
    assert parse('{"a": [1]}') == parse(b'{"a": [1]}') == {"a": [1]}
    for text in (DEEP, DEEP + "]" * len(DEEP), DEEP.encode()):
        with pytest.raises(ValueError, match=r"^it is nested too deeply$"):
            parse(text)
    for text in ("{", b"\xff{", '{"a": 1}}', "\x00"):
        with pytest.raises(ValueError, match=r"."):
            parse(text)


@pytest.mark.parametrize(
    "text", ["!!int ''", "!!bool x", "!!timestamp x", "2001-99-99", "!!python/name:os", "a:\n- b: ["]
)
def test_errors_of_yaml_have_one_line(text):
    with pytest.raises(ValueError, match=r"\A.+\Z"):
        parse_yaml(text)


def test_options_of_json_are_passed_on():
    assert parse_json("[NaN]", parse_constant=str) == ["NaN"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [("{", "Expecting .*"), (DEEP, "it is nested too deeply"), ("{}", "no 'a'"), ("1", "TypeError.*")],
)
def test_damage_names_the_file(content, reason):
    message = rf"^x\.json is damaged \({reason}\): copy it again$"
    with pytest.raises(ValueError, match=message), named_damage(Path("x.json"), "copy it again"):
        parse_json(content)["a"]
