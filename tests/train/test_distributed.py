"""Two ranks over gloo: the same run as on one rank, stopped and resumed, with every ZeRO stage."""

import json
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch

from sinklm.checkpoints.folders import list_checkpoints
from sinklm.train.run import train
from sinklm.train.stopping import REQUEUE_STATUS

from .processes import Ranks, run_module
from .test_probes import PROBES, check_same_run, probed
from .tiny import (
    assert_same_weights,
    copy_checkpoint,
    losses,
    make_store,
    metrics,
    moments,
    wait_for_step,
    weights,
)
from .worker import run_calls

pytestmark = pytest.mark.slow

LONG = ["train.num_steps=400", "validation.every_steps=null", "checkpoint.every_steps=null"]
# One run for each stage, in both precisions; `test_engine` tests the other combinations on one
# rank.
STAGES = [(0, "bf16"), (1, "bf16"), (2, "fp32"), (3, "fp32")]
SAVE_OFTEN = ["checkpoint.every_steps=2", "checkpoint.keep=null"]
FULL = [(2, 1), (3, 0)]  # ZeRO stage, and the rank whose disk is full; ZeRO-3 gathers weights after the files
# To another number of ranks: each stage once before and once after the conversion.
CONVERSIONS = [(0, "bf16", 3, "bf16"), (1, "bf16", 0, "fp32"), (2, "fp32", 1, "fp32"), (3, "fp32", 2, "fp32")]


# With a window that each step draws, in one pass and in segments.
DRAWN = ["model.attention.pattern=window", "model.attention.window=[2,20]"]
# ZeRO-3 partitions also the small parameters of the arm, which segments use outside of a module's
# forward.
ARM_IN_SEGMENTS = [
    *("train.segment_length=16", "model.sink.kind=kv_bias"),
    "deepspeed.zero_optimization.stage3_param_persistence_threshold=0",
]
WINDOWS = [(1, "bf16", DRAWN), (3, "fp32", [*DRAWN, *ARM_IN_SEGMENTS])]
# The same with Muon, whose matrices are cut by the boundary between the ranks.
MUON_STAGES = [(0, "bf16"), (1, "bf16"), (2, "fp32")]
MUON = ["optimizer.name=muon", "train.num_steps=8", "validation.every_steps=null"]
ONLY_SINKS = ["train.only_sinks=true", "model.sink.num_tokens=2"]
# With a spike in step 8: name of the run, ZeRO stage, precision, `train.on_spike`.
SPIKES = [("skipped-1", 1, "bf16", "skip"), ("skipped-3", 3, "fp32", "skip"), ("spiked", 1, "bf16", "stop")]


def settings(run_dir: Path, stage: int, precision: str) -> list[str]:
    return [f"train.run_dir={run_dir}", f"deepspeed.zero_stage={stage}", f"train.precision={precision}"]


def unlike_ranks(folder: Path) -> list[tuple[str, list[str], str]]:
    """Runs whose rank 1 has other settings: a name, these settings, and the error."""
    return [
        ("other-lr", ["optimizer.lr=0.5"], r"^rank 1: optimizer.lr is 0.5 on \S+, but 0.01 on rank 0: start all ranks"),
        ("unshared", [f"train.run_dir={folder / 'elsewhere'}"], r"^rank 1: .*elsewhere on \S+ is not the folder that"),
        (
            "other-data",
            [f"data.path={folder / 'other'}"],
            r"^rank 1: the fingerprint of data.path is '\w+' on .*: copy",
        ),
        ("damaged", [f"data.path={folder / 'damaged'}"], r"^rank 1: .*damaged\S+: checksum differs from"),
        ("same-data", [f"data.path={folder / 'same'}"], "^done$"),
    ]


def make_stores(folder: Path, store: Path) -> None:
    """Make the stores of `unlike_ranks`: other data, a damaged copy and an intact copy."""
    make_store(folder / "data", seed=1).rename(folder / "other")
    for name in ("damaged", "same"):
        shutil.copytree(store, folder / name, ignore=shutil.ignore_patterns(".verified.json"))
    shard = max((folder / "damaged").rglob("*.bin"), key=lambda path: path.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)


@pytest.fixture(scope="module")
def two_ranks(recipe, store, whole_run, muon_run, tmp_path_factory) -> Path:
    """Runs on two ranks: whole, resumed, converted from one rank, and with a full disk."""
    folder = tmp_path_factory.mktemp("two")
    make_stores(folder, store)
    calls: list[dict] = []
    for stage, precision in STAGES:
        whole, resumed = folder / f"whole-{stage}", folder / f"resumed-{stage}"
        calls.append({"overrides": settings(whole, stage, precision) + SAVE_OFTEN})
        # It goes on past two further saves.
        calls.append(
            {"overrides": settings(resumed, stage, precision) + SAVE_OFTEN, "copy": [str(whole), 2, str(resumed)]}
        )
    for stage, precision, windows in WINDOWS:
        whole, resumed = folder / f"windows-{stage}", folder / f"resumed-windows-{stage}"
        calls.append({"overrides": [*settings(whole, stage, precision), *windows]})
        calls.append(
            {"overrides": [*settings(resumed, stage, precision), *windows], "copy": [str(whole), 4, str(resumed)]}
        )
    for stage, precision in MUON_STAGES:
        whole, resumed = folder / f"muon-{stage}", folder / f"muon-resumed-{stage}"
        calls.append({"overrides": settings(whole, stage, precision) + MUON})
        calls.append({"overrides": settings(resumed, stage, precision) + MUON, "copy": [str(whole), 4, str(resumed)]})
    grown, stopped, ahead, diverged, dead, muon_grown = (
        folder / name for name in ("grown", "stopped", "ahead", "diverged", "dead", "muon-grown")
    )
    damaged, file = folder / "flipped", "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    calls += [
        {
            "overrides": settings(damaged, 1, "bf16"),
            "damage": [str(folder / "whole-1"), str(damaged), f"checkpoints/step-8/deepspeed/{file}"],
        },
        {"overrides": settings(grown, 3, "fp32"), "copy": [str(whole_run), 4, str(grown)]},
        {"overrides": settings(muon_grown, 2, "fp32") + MUON, "copy": [str(muon_run), 4, str(muon_grown)]},
        *(
            {
                "overrides": [
                    *settings(folder / f"full-{stage}", stage, "fp32"),
                    f"checkpoint.asynchronous={stage == 2}",
                ],
                "copy": [str(folder / f"whole-{stage}"), 4, str(folder / f"full-{stage}")],
                "file_limit": [rank, 100_000],
            }
            for stage, rank in FULL
        ),
        {
            "overrides": [*settings(folder / "unpinned", 1, "bf16"), "checkpoint.asynchronous=true"],
            "unpinned": 1,
        },
        {"overrides": [f"train.run_dir={folder / 'bad'}", "train.batch_size_tokens=96"]},
        *(
            {"overrides": [f"train.run_dir={folder / name}"], "only": [1, overrides]}
            for name, overrides, _ in unlike_ranks(folder)
        ),
        {"overrides": [f"train.run_dir={stopped}", *LONG], "signal": [1, signal.SIGTERM, 3, str(stopped)]},
        {
            "overrides": [*settings(ahead, 1, "bf16"), *LONG],
            "signal": [1, signal.SIGUSR1, 3, str(ahead)],
            "ahead": True,
        },
        {"overrides": settings(diverged, 1, "bf16"), "bad_loss": [1, 7, 2], "ahead": True},
        *(
            {
                "overrides": [
                    *settings(folder / run, stage, precision),
                    f"train.on_spike={choice}",
                    "checkpoint.every_steps=7",
                ],
                "bad_loss": [1, 8, 2, 1000.0],
                "min_steps": 3,
                "ahead": True,
            }
            for run, stage, precision, choice in SPIKES
        ),
        {"overrides": [*settings(folder / "measured", 3, "fp32"), *PROBES]},
        {"overrides": [*settings(folder / "only-sinks", 0, "fp32"), *ONLY_SINKS, f"model.init_from={whole_run}"]},
        {"overrides": [f"train.run_dir={dead}", *LONG], "signal": [1, signal.SIGKILL, 2, str(dead)]},
    ]
    (folder / "calls.json").write_text(json.dumps(calls))
    for call in calls:  # two micro-batches on each rank, as the other tests have on one
        call |= {"recipe": recipe, "overrides": [*call["overrides"], "train.micro_batch_size=2"]}
    results = Ranks(run_calls, calls, world_size=2).wait()
    assert [status for status, _ in results] == [0, -signal.SIGKILL], results[0][1]
    for rank, (_, output) in enumerate(results):
        (folder / f"output-{rank}").write_text(output)
    return folder


def outcomes(folder: Path, run: str) -> list[str]:
    """How a run ended, for each rank that survived it."""
    calls = json.loads((folder / "calls.json").read_text())
    (number,) = (i for i, call in enumerate(calls) if call["overrides"][0] == f"train.run_dir={folder / run}")
    texts = [(folder / f"output-{rank}").read_text().splitlines() for rank in (0, 1)]
    told = [[json.loads(line)["outcome"] for line in lines if line.startswith('{"outcome"')] for lines in texts]
    return [outcomes_of_rank[number] for outcomes_of_rank in told if number < len(outcomes_of_rank)]


@pytest.mark.parametrize(("stage", "precision"), STAGES)
def test_two_ranks_equal_one(two_ranks, whole_run, stage, precision):
    tolerance = 1e-5 if precision == "fp32" else 5e-3
    whole = two_ranks / f"whole-{stage}"
    assert list(losses(whole).values()) == pytest.approx(list(losses(whole_run).values()), abs=tolerance)
    validation = [
        [line["validation_loss"] for line in metrics(run) if "validation_loss" in line] for run in (whole, whole_run)
    ]
    assert validation[0] == pytest.approx(validation[1], abs=tolerance)


def test_two_ranks_train_the_sinks_alone_as_one_does(recipe, two_ranks, whole_run, tmp_path):
    both = two_ranks / "only-sinks"
    train(recipe, [*settings(tmp_path, 0, "fp32"), *ONLY_SINKS, f"model.init_from={whole_run}"])
    assert list(losses(both).values()) == pytest.approx(list(losses(tmp_path).values()), abs=1e-5)
    one, two = weights(tmp_path, 8), weights(both, 8)
    embedding = "gpt_neox.embed_in.weight"
    torch.testing.assert_close(two.pop(embedding), one.pop(embedding), rtol=0, atol=1e-4)
    assert_same_weights(two, one)  # frozen


@pytest.mark.parametrize(("stage", "precision"), STAGES)
def test_a_resumed_run_is_bit_for_bit_the_run_that_never_stopped(two_ranks, stage, precision):
    whole, resumed = two_ranks / f"whole-{stage}", two_ranks / f"resumed-{stage}"
    assert losses(resumed) == losses(whole)
    assert_same_weights(weights(resumed, 8), weights(whole, 8))


@pytest.mark.parametrize(("stage", "precision", "windows"), WINDOWS)
def test_two_ranks_draw_the_windows_of_one_and_resume_bit_for_bit(
    recipe, two_ranks, tmp_path, stage, precision, windows
):
    whole, resumed = two_ranks / f"windows-{stage}", two_ranks / f"resumed-windows-{stage}"
    assert outcomes(two_ranks, whole.name) == outcomes(two_ranks, resumed.name) == ["done"] * 2
    assert losses(resumed) == losses(whole)
    assert_same_weights(weights(resumed, 8), weights(whole, 8))
    alone, fewer = tmp_path / "alone", tmp_path / "fewer"
    copy_checkpoint(whole, 4, fewer)
    for run in (alone, fewer):
        train(recipe, [f"train.run_dir={run}", *windows])
    drawn = [line.get("window") for line in metrics(whole)]
    tolerance = 1e-5 if precision == "fp32" else 5e-3
    for run in (resumed, alone, fewer):
        assert [line.get("window") for line in metrics(run)] == drawn
        assert list(losses(run).values()) == pytest.approx(list(losses(whole).values()), abs=tolerance)


@pytest.mark.parametrize(("stage", "precision"), MUON_STAGES)
def test_muon_on_two_ranks_equals_one_and_resumes_bit_for_bit(two_ranks, muon_run, stage, precision):
    whole, resumed = two_ranks / f"muon-{stage}", two_ranks / f"muon-resumed-{stage}"
    tolerance = 1e-5 if precision == "fp32" else 1e-2
    assert list(losses(whole).values()) == pytest.approx(list(losses(muon_run).values()), abs=tolerance)
    assert losses(resumed) == losses(whole)
    assert_same_weights(weights(resumed, 8), weights(whole, 8))


def test_muon_goes_on_with_more_and_with_fewer_ranks(recipe, two_ranks, muon_run, tmp_path):
    expected = pytest.approx(list(losses(muon_run).values()), abs=1e-5)
    assert list(losses(two_ranks / "muon-grown").values()) == expected
    copy_checkpoint(two_ranks / "muon-2", 4, tmp_path)
    train(recipe, settings(tmp_path, 0, "fp32") + MUON)
    assert list(losses(tmp_path).values()) == expected


def test_a_damaged_file_of_one_rank_is_noticed_by_all(two_ranks):
    damaged, whole = two_ranks / "flipped", two_ranks / "whole-1"
    assert outcomes(two_ranks, "flipped") == ["done", "done"]
    (warning,) = (line for line in (two_ranks / "output-0").read_text().splitlines() if line.startswith("warning:"))
    assert "step-8 is damaged: deepspeed/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt has another sha256" in warning
    assert {"step-8", "step-8.damaged"} < {path.name for path in (damaged / "checkpoints").iterdir()}
    assert losses(damaged) == losses(whole)
    assert_same_weights(weights(damaged, 8), weights(whole, 8))


@pytest.mark.parametrize(("stage", "precision", "new_stage", "new_precision"), CONVERSIONS)
def test_a_run_goes_on_with_fewer_ranks_and_another_stage(
    recipe, two_ranks, tmp_path, stage, precision, new_stage, new_precision
):
    whole = two_ranks / f"whole-{stage}"
    copy_checkpoint(whole, 4, tmp_path)
    train(recipe, settings(tmp_path, new_stage, new_precision))
    tolerance = 1e-5 if precision == "fp32" else 5e-3
    assert list(losses(tmp_path).values()) == pytest.approx(list(losses(whole).values()), abs=tolerance)
    assert not list(tmp_path.glob("*universal*"))


def test_a_run_goes_on_with_more_ranks(two_ranks, whole_run):
    grown = losses(two_ranks / "grown")
    assert list(grown.values()) == pytest.approx(list(losses(whole_run).values()), abs=1e-5)


@pytest.mark.parametrize(("stage", "rank"), FULL)
def test_a_disk_that_is_full_on_one_rank_stops_all_and_costs_nothing(two_ranks, stage, rank):
    message, other = outcomes(two_ranks, f"full-{stage}")
    assert re.search(rf"cannot save .*step-8 \(earlier checkpoints are intact\): rank {rank}: writing failed", message)
    assert other == "exit 1"  # rank 0 reports the error
    assert list(list_checkpoints(two_ranks / f"full-{stage}")) == [4]


def test_memory_that_one_rank_cannot_pin_is_done_without_on_all(two_ranks):
    assert outcomes(two_ranks, "unpinned") == ["done", "done"]
    assert (two_ranks / "output-0").read_text().count("host memory cannot be pinned (rank 1: no memory)") == 1
    assert_same_weights(weights(two_ranks / "unpinned", 8), weights(two_ranks / "whole-1", 8))


@pytest.mark.parametrize("number", range(5))
def test_ranks_that_differ_are_named_before_training(two_ranks, number):
    name, _, expected = unlike_ranks(two_ranks)[number]
    message, other = outcomes(two_ranks, name)
    assert re.search(expected, message.partition(": ")[2] or message)
    assert other == ("done" if message == "done" else "exit 1")
    assert (two_ranks / name / "metrics.jsonl").exists() == (message == "done")
    assert not list(two_ranks.glob("*/.shared-*"))


def test_a_batch_that_the_ranks_cannot_share_is_reported_once(two_ranks):
    message, other = outcomes(two_ranks, "bad")
    assert "set train.batch_size_tokens to a multiple of 64" in message
    assert other == "exit 1"


@pytest.mark.parametrize(
    ("run", "name", "status"), [("stopped", "SIGTERM", 128 + signal.SIGTERM), ("ahead", "SIGUSR1", REQUEUE_STATUS)]
)
def test_a_signal_to_one_rank_saves_on_all(two_ranks, run, name, status):
    assert outcomes(two_ranks, run) == [f"exit {status}"] * 2
    assert f"stopped by {name}; the state is saved" in (two_ranks / "output-0").read_text()
    (step,) = list_checkpoints(two_ranks / run)
    assert list(losses(two_ranks / run)) == list(range(1, step + 1))


def test_a_loss_that_is_not_finite_on_one_rank_stops_all(two_ranks):
    message, other = outcomes(two_ranks, "diverged")
    assert "step 7: the loss is nan on rank 1. Training stopped before the update" in message
    assert other == "exit 1"
    assert list(losses(two_ranks / "diverged")) == [1, 2, 3, 4, 5, 6]
    assert list(list_checkpoints(two_ranks / "diverged")) == [4]


@pytest.mark.parametrize("run", ["skipped-1", "skipped-3"])
def test_a_spike_on_one_rank_is_skipped_on_all(two_ranks, run):
    assert outcomes(two_ranks, run) == ["done"] * 2
    assert_same_weights(weights(two_ranks / run, 7), weights(two_ranks / run, 8))
    assert all(map(torch.equal, moments(two_ranks / run, 7), moments(two_ranks / run, 8)))
    (line,) = (line for line in metrics(two_ranks / run) if "spikes" in line)
    assert (line["step"], line["is_skipped"]) == (8, True)
    assert line["loss_by_rank"][1] > 100 * line["loss_by_rank"][0]


def test_a_spike_on_one_rank_stops_all(two_ranks):
    message, other = outcomes(two_ranks, "spiked")
    assert re.match(r"BadStep: step 8: the loss .* is a spike", message)
    assert other == "exit 1"
    assert list(list_checkpoints(two_ranks / "spiked")) == [7]


def test_measuring_with_partitioned_weights_does_not_change_the_run(recipe, two_ranks, tmp_path):
    check_same_run(two_ranks / "whole-3", two_ranks / "measured")
    train(recipe, [f"train.run_dir={tmp_path}", *PROBES])
    for alone, two in zip(probed(tmp_path), probed(two_ranks / "measured"), strict=True):
        assert two["streaming_loss"] == pytest.approx(alone["streaming_loss"], abs=1e-5)
        assert two["attention_mass"] == pytest.approx(alone["attention_mass"], abs=1e-5)


def test_a_dead_rank_ends_the_others_with_a_message(two_ranks):
    (message,) = outcomes(two_ranks, "dead")
    assert re.match(r"ConnectionError: rank 1 \(host \S+, process \d+\) died\. It was last seen .*\. All", message)


def test_a_killed_run_goes_on_bit_for_bit(recipe, tmp_path):
    """A process is ended by SIGTERM at an arbitrary step, and the same command is run again."""
    # Many steps, because the signal may be late on a loaded machine.
    steps = ["train.num_steps=120", "train.micro_batch_size=8", "validation.every_steps=null"]
    steps += ["checkpoint.every_steps=40"]
    interrupted = tmp_path / "interrupted"
    process = Ranks(run_module, "sinklm.train", [recipe, f"train.run_dir={interrupted}", *steps], world_size=1)
    wait_for_step(interrupted, 5)
    process.signal(signal.SIGTERM, rank=0)
    ((status, output),) = process.wait()
    assert status == 128 + signal.SIGTERM, output
    assert 5 <= max(list_checkpoints(interrupted)) < 120
    train(recipe, [f"train.run_dir={interrupted}", *steps])
    train(recipe, [f"train.run_dir={tmp_path / 'whole'}", *steps])
    assert losses(interrupted) == losses(tmp_path / "whole")
    assert_same_weights(weights(interrupted, 120), weights(tmp_path / "whole", 120))
