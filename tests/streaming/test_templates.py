"""Chat templates that fail, never end or write too much."""

import threading
import time

import pytest

from sinklm.streaming import templates
from sinklm.streaming.chat import TemplateTurns
from sinklm.streaming.templates import within

from .test_chat import tokenizer


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for %}", r"fails \(Expected an expression"),
        ("{{ x.y.z }}", r"fails \('x' is undefined\)"),
        ("{{ raise_exception('no system role') }}", r"fails \(no system role\)"),
        ("{{ raise_exception('') }}", r"fails \(TemplateError\)"),
        ("{{ ''.__class__.__mro__ }}", r"fails \(access to attribute"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", r"fails \(maximum recursion depth"),
        ("{% for i in range(10**9) %}{% endfor %}", r"fails \(Range too big"),
        ("{{ 'a' * 20_000_000 }}", "returns more than 10,000,000 characters"),
        ("{% for i in range(9**5) %}{% for j in range(9**5) %}{% endfor %}{% endfor %}", "takes more than 0 s"),
    ],
)
def test_a_bad_template_is_an_error(template, message, monkeypatch):
    monkeypatch.setattr(templates, "SECONDS", 0.3 if "takes" in message else 30)
    with pytest.raises(ValueError, match=f"the tokenizer's chat template {message}.*: use a tokenizer with another"):
        TemplateTurns(tokenizer(template))


def test_a_result_that_is_not_text_is_named(monkeypatch):
    made = tokenizer("x")
    monkeypatch.setattr(type(made), "apply_chat_template", lambda *_, **__: ["x"])
    with pytest.raises(ValueError, match="the tokenizer's chat template returns a list and not text: use"):
        templates.render(made, [], reply_begins=False)


def test_a_function_that_takes_too_long_is_ended():
    def forever():
        while True:
            pass

    before = set(threading.enumerate())
    with pytest.raises(TimeoutError):
        within(0.05, forever)
    deadline = time.monotonic() + 10
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not set(threading.enumerate()) - before
    assert within(5, lambda: 3) == 3
    with pytest.raises(KeyError):
        within(5, lambda: {}["x"])
