"""Secrets from the environment are in no file that a run writes."""

import os
from pathlib import Path

import pytest

from sinklm.train.recipe import config_yaml, load_config
from sinklm.train.run import train

SECRETS = {
    "MY_SECRET": "correct-horse-battery-staple",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "hf_abcdefghijklmnopqrstuvwxyz",
}
INTERPOLATED = [
    "deepspeed.comet.api_key=${oc.env:MY_SECRET}",
    "deepspeed.comet.project=a-${oc.env:MY_SECRET}",
    "train.seed=${oc.decode:${oc.env:MY_SEED}}",
    "model.sink.kind=${oc.env:MY_KIND}",
]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name, value in {**SECRETS, "MY_SEED": "7", "MY_KIND": "token"}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "fp32")])
def test_no_file_of_a_run_has_a_secret(recipe, store, tmp_path, monkeypatch, stage, precision):
    if stage == 0:  # once, because wandb takes seconds to start
        monkeypatch.setenv("WANDB_MODE", "offline")
    wandb = "wandb.mode=offline" if stage == 0 else "wandb.mode=disabled"
    settings = [f"deepspeed.zero_stage={stage}", f"train.precision={precision}", "train.num_steps=1", wandb]
    (tmp_path / SECRETS["MY_SECRET"]).symlink_to(store)
    settings.append(f"data.path={tmp_path}/${{oc.env:MY_SECRET}}")
    train(recipe, [f"train.run_dir={tmp_path / 'run'}", *settings, *INTERPOLATED])
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {"config.yaml", "environment.json", "state.json", "rank-00000.pt"} <= {path.name for path in written}
    assert any(path.suffix == ".wandb" for path in written) == (stage == 0)
    for path in written:
        for name, secret in SECRETS.items():
            assert secret.encode() not in path.read_bytes(), f"{name} is in {path}"


def test_the_stored_recipe_is_a_recipe_of_the_same_run(tmp_path):
    overrides = ["data.path=${oc.env:MY_SECRET}/x", "train.run_dir=${data.path}/run", r"wandb.project=a\${b}"]
    config = load_config("pythia-14m", [*overrides, *INTERPOLATED, "deepspeed.comet.tags=[a, '${data.path}']"])
    assert config.wandb.project == "a${b}"
    (tmp_path / "stored.yaml").write_text(config_yaml(config))
    again = load_config(str(tmp_path / "stored.yaml"))
    assert again.model_dump() == config.model_dump()
    assert again.train.run_dir == f"{SECRETS['MY_SECRET']}/x/run"
    assert again.train.seed == 7
    assert SECRETS["MY_SECRET"] not in config_yaml(config)
    os.environ["MY_SEED"] = "8"
    assert load_config(str(tmp_path / "stored.yaml")).train.seed == 7  # the number was stored


def test_a_fixed_setting_that_is_interpolated_may_not_change(recipe, tmp_path, monkeypatch, capsys):
    run, other = tmp_path / "run", tmp_path / "other"
    train(recipe, [f"train.run_dir={other}", "train.num_steps=1"])
    started = [f"train.run_dir={run}", "model.init_from=${oc.env:MY_MODEL}", "checkpoint.pythia_steps=true"]
    monkeypatch.setenv("MY_MODEL", str(other))
    train(recipe, [*started, *INTERPOLATED, "train.num_steps=1"])
    _keep_step_0(run)
    train(recipe, [*started, *INTERPOLATED, "train.num_steps=2"])
    assert "changed since the checkpoint: train.num_steps: 1 → 2" in capsys.readouterr().out
    _keep_step_0(run)
    monkeypatch.setenv("MY_MODEL", str(run))
    with pytest.raises(
        ValueError, match=r"model\.init_from is '\$\{oc\.env:MY_MODEL\}', but .*step-0 was trained with"
    ):
        train(recipe, [*started, *INTERPOLATED])
    monkeypatch.setenv("MY_MODEL", str(other))
    monkeypatch.setenv("MY_SEED", "8")
    with pytest.raises(ValueError, match=r"train\.seed is 8, but .*step-0 was trained with 7"):
        train(recipe, [*started, *INTERPOLATED])


def _keep_step_0(run: Path) -> None:
    for path in (run / "checkpoints").iterdir():
        if path.name != "step-0":
            (path / "COMPLETE").unlink()
