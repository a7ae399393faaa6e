"""Wrong names of commands, options and keys get a suggestion, with every supported typer."""

import re
import shlex
import sys

import pytest

from sinklm.cli.main import main
from sinklm.train.__main__ import main as launched


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("evaluate", "no such command 'evaluate': did you mean eval? See sinklm --help"),
        ("decode model", "no such command 'decode': did you mean bench decode? See sinklm --help"),
        (
            "eval stream model",
            "no such command 'stream': did you mean streaming, stream-qa or stream-eval? See sinklm eval --help",
        ),
        ("nothing", "no such command 'nothing'; see sinklm --help"),
        ("generate m p --top_k 3", "no such option --top_k: did you mean --top-k? See sinklm generate --help"),
        ("export m -o e", "no such option -o: give the output without -o; see sinklm export --help"),
        (
            "generate m --prompt Hello",
            "no such option --prompt: give the prompts without --prompt; see sinklm generate --help",
        ),
        ("chat m --cahce 3", "no such option --cahce: did you mean --cache? See sinklm chat --help"),
        ("train --seed 3", "no such option --seed: write train.seed=3; see sinklm train --help"),
        ("train quickstart --lr=1e-3", "no such option --lr: write optimizer.lr=1e-3; see sinklm train --help"),
        ("train quickstart -o mine", "no such option -o: write train.run_dir=mine; see sinklm train --help"),
        (
            "train quickstart --every-steps",
            "no such option --every-steps: write validation.every_steps=… or checkpoint.every_steps=…; see sinklm "
            "train --help",
        ),
        (
            "train quickstart --batch-size 8",
            "no such option --batch-size: did you mean train.batch_size_tokens or train.micro_batch_size? See sinklm "
            "train --help",
        ),
        (
            "export run x --to ggfu",
            "Invalid value for '--to': 'ggfu' is not one of 'hf', 'gguf', 'hub'; see sinklm export --help",
        ),
        ("train quickstart --dryrun", "no such option --dryrun: did you mean --dry-run? See sinklm train --help"),
    ],
)
def test_a_wrong_name_gets_the_near_ones(line, said, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["sinklm", *shlex.split(line)])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert capfd.readouterr().err == f"error: {said}\n"


def test_a_launcher_gets_the_same_hint(monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["sinklm.train", "quickstart", "--seed=3", "--local_rank=0"])
    with pytest.raises(SystemExit) as end:
        launched()
    assert end.value.code == 2
    assert capfd.readouterr().err == "error: no such option --seed: write train.seed=3\n"


def test_every_command_has_the_short_option_for_help(monkeypatch, capfd):
    for line in ("-h", "eval -h", "eval streaming -h"):
        monkeypatch.setattr(sys, "argv", ["sinklm", *line.split()])
        with pytest.raises(SystemExit) as end:
            main()
        assert not end.value.code
        assert "Usage: sinklm" in capfd.readouterr().out


def test_the_keys_and_recipes_are_listed(monkeypatch, capfd):
    from sinklm.train.config import TrainingConfig
    from sinklm.train.keys import key_sections
    from sinklm.train.recipe import dotted_keys, recipe_names

    keys = [key for section in key_sections() for key in section.keys]
    assert {key.name for key in keys} == set(dotted_keys(TrainingConfig))
    assert all(key.description for key in keys)
    assert all(section.description for section in key_sections())
    monkeypatch.setenv("COLUMNS", "80")
    for line, names in (("train --keys", [key.name for key in keys]), ("recipes", recipe_names())):
        monkeypatch.setattr(sys, "argv", ["sinklm", *line.split()])
        with pytest.raises(SystemExit) as end:
            main()
        assert not end.value.code
        said = capfd.readouterr().out
        assert all(re.search(rf"^ *{re.escape(name)}[= ]", said, flags=re.MULTILINE) for name in names)
        assert max(map(len, said.splitlines())) <= 80 or line != "train --keys"
