"""Chat templates that fail, never end or write too much; the sinks in them."""

import threading
import time

import pytest

from sinklm import chat_templates
from sinklm.chat_templates import begins_with_sinks, template_with_sinks, within
from sinklm.streaming.chat import TemplateTurns

from .streaming.test_chat import tokenizer


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
    monkeypatch.setattr(chat_templates, "SECONDS", 0.3 if "takes" in message else 30)
    with pytest.raises(ValueError, match=f"the chat template {message}.*: correct it, or use another"):
        TemplateTurns(tokenizer(template))


def test_a_result_that_is_not_text_is_named(monkeypatch):
    made = tokenizer("x")
    monkeypatch.setattr(type(made), "apply_chat_template", lambda *_, **__: ["x"])
    with pytest.raises(ValueError, match="the chat template returns a list and not text: correct"):
        chat_templates.render(made, [], reply_begins=False)


def test_a_function_that_takes_too_long_is_ended():
    def forever():
        while True:
            pass

    before = set(threading.enumerate())
    with pytest.raises(TimeoutError):
        within(0.05, forever)
    deadline = time.monotonic() + 60
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not set(threading.enumerate()) - before
    assert within(60, lambda: 3) == 3
    with pytest.raises(KeyError):
        within(60, lambda: {}["x"])


LOOP = "{% for m in messages %}{{ m.content }}{% endfor %}"
ONE, TWO = ["<|sink|>"], ["<|sink|>", "<|sink2|>"]


@pytest.mark.parametrize(
    ("template", "names", "begins"),
    [
        (LOOP, [], True),
        (LOOP, ONE, False),
        ("{{ bos_token }}" + LOOP, ONE, True),
        ("{{ bos_token }}" + LOOP, TWO, False),
        ("<|sink|><|sink2|>" + LOOP, TWO, True),
        # It names the token, but does not write it, or not first.
        ("{% if bos_token is defined %}{% endif %}" + LOOP, ONE, False),
        ("{# bos_token #}" + LOOP, ONE, False),
        (LOOP + "{{ bos_token }}", ONE, False),
        ("{{ eos_token + bos_token }}" + LOOP, ONE, False),
        # Of some conversations only.
        ("{% if messages[0].role == 'user' %}{{ bos_token }}{% endif %}" + LOOP, ONE, False),
        (
            "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}{% endif %}{{ m.content }}{% endfor %}",
            ONE,
            False,
        ),
        # It writes the token without its name.
        ("{{ '<|si' + 'nk|>' }}" + LOOP, ONE, True),
        # It refuses a system message, as Gemma's does.
        (
            "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}{{ bos_token }}"
            + LOOP,
            ONE,
            True,
        ),
        # It refuses all probes, so its text decides.
        ("{{ bos_token }}{{ raise_exception('x') }}", ONE, True),
        ("{{ raise_exception('x') }}", ONE, False),
    ],
)
def test_the_rendered_text_shows_whether_a_template_begins_with_the_sinks(template, names, begins):
    made = tokenizer(template)
    assert begins_with_sinks(made, template, names) is begins
    changed = template_with_sinks(made, template, names)
    assert (changed == template) is begins
    if "raise_exception('x')" not in template:
        for probe in chat_templates.PROBES[:2]:
            text = chat_templates.render(made, probe, template=changed, bos_token=(names or [""])[0])
            assert text.startswith("".join(names))
            assert begins or text.count("<|sink") == len(names)
            assert "".join(message["content"] for message in probe) in text.replace("<|sink|>", "")
