"""`sinklm chat` with its messages on stdin."""

import io
import re

import pytest

from sinklm.cli.chat import chat
from sinklm.files import locked
from sinklm.streaming import StreamingCache

from ..eval.checkpoints import small_model, write_checkpoint


def test_each_line_gets_a_reply(tmp_path, capfd, monkeypatch):
    checkpoint = write_checkpoint(tmp_path / "model", small_model(1))
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n\nWho are you?\n"))
    chat(str(checkpoint), max_new_tokens=10, cache="1+20")
    shown = capfd.readouterr()
    assert shown.out.strip()
    assert " tokens seen; cache 1+20" in shown.err


def test_reset_starts_a_new_conversation_and_a_template_can_be_given(tmp_path, capfd, monkeypatch):
    checkpoint = str(write_checkpoint(tmp_path / "model", small_model(1)))
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}")
    for options in ({}, {"chat_template": str(template)}):
        replies = []
        for lines in ("Hello\n", "Who?\n/reset\nHello\n"):
            monkeypatch.setattr("sys.stdin", io.StringIO(lines))
            chat(checkpoint, max_new_tokens=5, temperature=0, **options)
            shown = capfd.readouterr()
            replies.append(shown.out.splitlines()[-1])
            assert ("no chat template" in shown.err) == (not options)
        assert replies[0] == replies[1]
    with pytest.raises(FileNotFoundError, match=r"--chat-template no\.jinja cannot be read: .*; pass a file"):
        chat(checkpoint, chat_template="no.jinja")
    with pytest.raises(OSError, match=r"--chat-template Be brief.* cannot be read: File name too long; pass a file"):
        chat(checkpoint, chat_template="Be brief. " * 30)


def test_a_session_goes_on_after_a_restart(tmp_path, capfd, monkeypatch):
    checkpoint = str(write_checkpoint(tmp_path / "model", small_model(1)))
    options = {"temperature": 0.0, "max_new_tokens": 10}

    def say(*messages, **more):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{message}\n" for message in messages)))
        chat(checkpoint, **options | more)
        return capfd.readouterr()

    together = say("Hello", "Who are you?", cache="1+20", memory="2x8", system="Be brief.").out
    session = tmp_path / "session.safetensors"
    first = say("Hello", cache="1+20", memory="2x8", system="Be brief.", session=session).out
    second = say("Who are you?", session=session)
    assert first + second.out == together
    assert f"continuing {session}, which has 2 messages" in second.err
    assert re.search(r"cache 1\+20, .*; memory 2x8, .* MB in host memory", second.err)
    for wrong, message in (
        ({"cache": "1+30"}, "--cache is 1\\+30"),
        ({"memory": "3x8"}, "--memory is 3x8, but .* has a memory 2x8/8: leave out --memory"),
        ({"memory": "2x8/1"}, "--memory is 2x8/1, but .* has a memory 2x8/8: leave out --memory"),
        ({"system": "Shout."}, "--system differs"),
    ):
        with pytest.raises(ValueError, match=message):
            say("And where?", session=session, **wrong)
    checkpoint = str(write_checkpoint(tmp_path / "other", small_model(0)))
    with pytest.raises(ValueError, match="another model"):
        say("And where?", session=session)


def test_an_interrupted_message_leaves_the_saved_conversation(tmp_path, capfd, monkeypatch):
    checkpoint = str(write_checkpoint(tmp_path / "model", small_model(1)))
    (tmp_path / "link").symlink_to(tmp_path / "new" / "session")

    def say(*messages, session):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{message}\n" for message in messages)))
        chat(checkpoint, temperature=0.0, max_new_tokens=10, session=session)
        return capfd.readouterr()

    together = say("Hello", "Who are you?", session=tmp_path / "other").out
    begin = StreamingCache.begin_pass
    num_calls = []

    def interrupted(self, inputs, is_token):
        num_calls.append(inputs.shape[1])
        if sum(num > 1 for num in num_calls) == 2:  # the second message
            num_calls.append(2)
            raise KeyboardInterrupt
        return begin(self, inputs, is_token)

    monkeypatch.setattr(StreamingCache, "begin_pass", interrupted)
    shown = say("Hello", "Stop!", "Who are you?", session=tmp_path / "link")
    assert "it is not part of the conversation" in shown.err
    assert shown.out.replace("\n\n", "\n") == together
    assert "which has 4 messages" in say(session=tmp_path / "new" / "session").err
    assert (tmp_path / "link").is_symlink()


def test_a_session_has_one_chat(tmp_path):
    busy = "session is in use by another `sinklm chat`: end it"
    with locked(tmp_path / ".session.lock", ""), pytest.raises(ValueError, match=busy):
        chat("model", session=tmp_path / "session")
