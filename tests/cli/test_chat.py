"""`sinklm chat` with its messages on stdin."""

import io

from sinklm.cli.chat import chat

from ..eval.checkpoints import small_model, write_checkpoint


def test_each_line_gets_a_reply(tmp_path, capfd, monkeypatch):
    checkpoint = write_checkpoint(tmp_path / "model", small_model(1))
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n\nWho are you?\n"))
    chat(str(checkpoint), max_new_tokens=10, cache="1+20")
    shown = capfd.readouterr()
    assert shown.out.strip()
    assert " tokens seen; cache 1+20" in shown.err
