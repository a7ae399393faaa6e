"""The scripts of the small-scale study: the job queue, and the tables made from its runs."""

import argparse
import json
import re
import runpy
import sys
import time
from pathlib import Path

import pytest
import yaml

FOLDER = Path(__file__).parents[1] / "study"


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")


def job(name: str, folder: Path, code: str):
    from jobs import Job

    return Job(name, (sys.executable, "-c", code), folder / f"{name}.log")


def test_jobs_run_on_their_gpus_and_a_failure_stops_no_other(tmp_path, capsys):
    from jobs import JobQueue

    show = "import os; print('GPU', os.environ['CUDA_VISIBLE_DEVICES'])"
    jobs = [job("bad", tmp_path, "raise SystemExit('no data')"), *(job(f"good{i}", tmp_path, show) for i in range(3))]
    assert not JobQueue(jobs).run()
    assert [j.is_done for j in jobs] == [False, True, True, True]
    assert {j.log.read_text() for j in jobs[1:]} <= {"GPU 0\n", "GPU 1\n"}
    assert "bad: FAILED with status 1: no data" in capsys.readouterr().out


def test_finished_jobs_are_not_run_again(tmp_path, capsys):
    from jobs import JobQueue

    jobs = [job("once", tmp_path, f"open({str(tmp_path / 'count')!r}, 'a').write('x')")]
    assert JobQueue(jobs).run()
    assert JobQueue(jobs).run()
    assert (tmp_path / "count").read_text() == "x"


def test_the_time_limit_stops_running_jobs_and_starts_no_more(tmp_path, capsys, monkeypatch):
    from jobs import JobQueue

    code = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit('saved')); print('up', flush=True); "
    jobs = [job(name, tmp_path, f"{code}time.sleep(600)") for name in ("first", "second", "third")]
    clock = time.monotonic

    def late() -> float:
        """The limit is over when the first job can receive a signal."""
        log = jobs[0].unfinished_log
        return clock() + 61 * (log.exists() and "up" in log.read_text())

    monkeypatch.setattr("jobs.time.monotonic", late)
    assert not JobQueue(jobs, minutes=1).run()
    assert "first: stopped: saved" in capsys.readouterr().out
    assert not jobs[2].unfinished_log.exists()


def write_run(folder: Path, name: str, losses: list[float], perplexities: list[float]) -> None:
    run, results = folder / "runs" / name, folder / "results" / name
    run.mkdir(parents=True)
    results.mkdir(parents=True)
    records = [
        {"step": i + 1, "loss": loss, "positions": 512 * (i + 1), "tokens_per_second": 100.0 * (i + 1), "memory_gib": i}
        for i, loss in enumerate(losses)
    ]
    records.append({"step": len(losses), "validation_loss": losses[-1] + 0.5})
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    planned = {"num_steps": 2, "batch_size_tokens": 512}
    (run / "config.yaml").write_text(yaml.safe_dump({"train": {"seed": 1, **planned}}))
    (run / "environment.json").write_text("{}")
    measured = [
        {"configuration": cache, "perplexity": value, "binned_losses": [1.0]}
        for cache, value in zip(("dense", "0+32", "1+31", "4+28"), [99.0, *perplexities], strict=True)
    ]
    model = {"num_parameters": 7, "folder": str(run / "checkpoints" / f"step-{len(losses)}" / "model")}
    report = {"model": model, "text": {"sha256": "", "num_tokens": 64}, "bin_edges": [0, 64]}
    (results / "streaming.json").write_text(json.dumps({**report, "results": measured}))


def test_a_table_compares_each_run_with_vanilla_of_its_seed(tmp_path):
    from report import perplexity
    from results import collect

    write_run(tmp_path, "vanilla", [4.0, 3.5], [12.0, 11.0, 10.0])
    write_run(tmp_path, "gate", [4.0, 3.54], [20.0, 10.0, 10.0])
    write_run(tmp_path, "vanilla-seed-2", [4.0, 1.5], [12.0, 11.0, 10.0])
    write_run(tmp_path, "gate-seed-2", [4.0, 1.52], [1200.0, 10.0, 10.0])
    rows = {
        row.split(" | ")[0].strip("| "): row.split(" | ")[1:]
        for row in perplexity(collect(tmp_path)["runs"]).splitlines()
    }
    assert rows["vanilla"] == ["4.0000", "", "12.00", "11.00", "10.00", "1.200", "1.1000 |"]
    assert rows["gate"] == ["4.0400", "+1.00 %", "20.00", "10.00", "10.00", "2.000", "1.0000 |"]
    assert rows["gate-seed-2"][:3] == ["2.0200", "+1.00 %", "1,200"]


def test_a_run_that_ended_early_is_marked_and_compared_with_vanilla_at_its_end(tmp_path):
    from report import perplexity
    from results import collect

    write_run(tmp_path, "vanilla", [4.0, 3.5], [12.0, 11.0, 10.0])
    write_run(tmp_path, "gate", [4.04], [20.0, 10.0, 10.0])
    runs = collect(tmp_path)["runs"]
    runs["vanilla"]["validation_loss"].insert(0, [512, 4.5])
    assert perplexity(runs).splitlines()[2].startswith("| gate (50 % of training) | 4.5400 | +0.89 % |")


def test_a_validation_before_the_end_of_a_run_is_shown_with_its_tokens(tmp_path):
    from report import perplexity
    from results import collect

    write_run(tmp_path, "vanilla", [4.0, 3.5], [12.0, 11.0, 10.0])
    write_run(tmp_path, "gate", [4.0, 3.5], [12.0, 11.0, 10.0])
    runs = collect(tmp_path)["runs"]
    runs["vanilla"]["validation_loss"].insert(0, [512, 4.5])
    runs["gate"]["validation_loss"] = [[512, 4.41]]
    assert perplexity(runs).splitlines()[2].startswith("| gate | 4.4100 at 0 M | \N{MINUS SIGN}2.00 % |")


def test_a_cache_that_was_not_run_is_left_empty(tmp_path):
    from report import perplexity
    from results import collect

    write_run(tmp_path, "vanilla-12x64", [4.0, 3.5], [12.0, 11.0, 10.0])
    write_run(tmp_path, "vanilla-16x64", [4.0, 3.5], [12.0, 11.0, 10.0])
    runs = collect(tmp_path)["runs"]
    del runs["vanilla-16x64"]["streaming"]["perplexity"]["4+28"]
    assert perplexity(runs).splitlines()[-1] == "| vanilla-16x64 | 4.0000 |  | 12.00 | 11.00 |  |  |  |"


def test_perplexities_by_the_size_of_the_cache_are_measured_beside_the_others(tmp_path):
    from evaluate import job
    from report import cache_sizes
    from results import collect

    arguments = argparse.Namespace(folder=tmp_path, text=["book.txt"], data_dir=None, tokens=64)
    outputs = [job(kind, tmp_path / "runs" / "gate", arguments).command[-1] for kind in ("streaming", "cache-sizes")]
    assert outputs == [str(tmp_path / "results" / "gate"), str(tmp_path / "results" / "gate" / "cache-sizes")]
    for name in ("gate", "vanilla"):
        write_run(tmp_path, name, [4.0, 3.5], [12.0, 11.0, 10.0])
    found = {"0+1024": 2000.0, "0+16": 9.0, "1+15": 8.0, "4+1020": 7.0}
    report = {"model": {"folder": "step-2/model"}, "text": {"sha256": "ab12", "num_tokens": 64}}
    report["results"] = [{"configuration": cache, "perplexity": value} for cache, value in found.items()]
    Path(outputs[1]).mkdir()
    (Path(outputs[1]) / "streaming.json").write_text(json.dumps(report))
    runs = collect(tmp_path)["runs"]
    assert runs["gate"]["cache_sizes"] == {"text_sha256": "ab12", "num_tokens": 64, "perplexity": found}
    assert cache_sizes(runs).splitlines() == [
        "|  | kept tokens | 16 | 1,024 |",
        "|---|---:|---:|---:|",
        "| gate | 0 | 9.00 | 2,000 |",
        "| gate | 1 | 8.00 |  |",
        "| gate | 4 |  | 7.00 |",
    ]
    assert cache_sizes({"vanilla": runs["vanilla"]}) == ""


@pytest.mark.parametrize(
    ("name", "plain"),
    [("gate", "vanilla"), ("two-sinks-seed-2", "vanilla-seed-2"), ("gate-12x64-seed-3", "vanilla-12x64-seed-3")],
)
def test_the_plain_run_to_compare_with_has_the_same_size_and_seed(name, plain):
    from results import vanilla_of

    assert vanilla_of(name) == vanilla_of(plain) == plain


@pytest.mark.parametrize(("tokens", "shown"), [(996, "gate (99 % of training)"), (1000, "gate"), (1024, "gate")])
def test_only_an_incomplete_run_is_marked(tokens, shown):
    from report import label

    planned = {"num_steps": 10, "batch_size_tokens": 100}
    assert label("gate", {"config": {"train": planned}, "tokens": tokens}) == shown


def sinks_report(**masses: list[list[float]]) -> dict:
    """A report for two layers with two heads and one sequence."""
    heads = {name.replace("_", " "): mass for name, mass in masses.items()}
    flat = {name: [*mass[0], *mass[1]] for name, mass in heads.items()}
    return {
        "epsilon": 0.3,
        "positions": {name: -1 if name == "no token" else i for i, name in enumerate(heads)},
        "heads": {name: {"mass": mass} for name, mass in heads.items()},
        "sink_rate": {name: sum(mass > 0.3 for mass in values) / 4 for name, values in flat.items()},
        "mass": {name: sum(values) / 4 for name, values in flat.items()},
    }


def test_a_head_that_attends_to_both_sink_tokens_counts_once():
    from results import sink_rate

    first, second = [[0.4, 0.2], [0.0, 0.1]], [[0.4, 0.2], [0.5, 0.1]]
    report = sinks_report(sink_token_1=first, sink_token_2=second, first_text_token=[[0.0, 0.0], [0.0, 0.4]])
    assert sum(report["sink_rate"][f"sink token {i}"] for i in (1, 2)) == 0.75
    assert sink_rate(report, "sink token") == 0.75  # the first head once, the second for both together
    report["heads"]["sink token 2"]["mass"][1][0] = 0.1
    assert sink_rate(report, "sink token") == 0.5
    assert sink_rate(report, "first text token") == 0.25


def test_a_position_without_attention_is_left_empty():
    from report import sinks

    planned = {"num_steps": 1, "batch_size_tokens": 8}
    report = sinks_report(first_text_token=[[0.5, 0.5], [0.1, 0.1]], no_token=[[1e-6, -1e-6], [0.0, 0.0]])
    row = sinks({"vanilla": {"config": {"train": planned}, "tokens": 8, "sinks": report}}).splitlines()[-1]
    assert row == "| vanilla |  |  | 50.0 | 30.0 |  |  |"


def test_layer_statistics_are_collected_at_named_positions_and_for_the_others():
    from results import _layers

    layers = {"hidden_norm": [[8.0, 5.0, 1.0, 3.0], [9.0, 5.0, 2.0, 2.0]], "median_activation": [0.5, 0.6]}
    positions = {"sink token": 0, "first text token": 1, "no token": -1}
    norms = {"sink token": [8.0, 9.0], "first text token": [5.0, 5.0], "others": [2.0, 2.0]}
    assert _layers({"layers": layers, "positions": positions}) == {
        "hidden_norm": norms,
        "median_activation": [0.5, 0.6],
    }


def test_activations_are_those_of_the_token_with_the_most_attention():
    from report import activations

    report = sinks_report(
        sink_token=[[0.5, 0.5], [0.5, 0.5]], first_text_token=[[0.1] * 2] * 2, no_token=[[0.9] * 2] * 2
    )
    places = {"first text token": [1.0, 1.0], "others": [2.0, 4.0]}
    report["layers"] = {
        "hidden_norm": {"sink token": [4.0, 40.0], **places},
        "value_norm": {"sink token": [0.2, 0.8], **places},
        "largest_activation": {"sink token": [10.0, 60.0], **places},
        "median_activation": [0.5, 0.5],
        "query_key_cosine": {"sink token": [0.25, 0.5], "first text token": [1.0, 1.0], "others": [-0.5, -0.25]},
    }
    planned = {"num_steps": 1, "batch_size_tokens": 8}
    row = activations({"gate": {"config": {"train": planned}, "tokens": 8, "sinks": report}}).splitlines()[-1]
    assert row == "| gate | sink token | 10.0 (1) | 120 (1) | 0.10 (0) | 0.38 | \N{MINUS SIGN}0.38 |"


def test_the_loss_due_to_a_cache_is_averaged_per_doubling_of_the_position():
    from figures import cost_by_position

    report = {
        "bin_edges": [0, 2, 4, 8, 10, 16, 32, 64],
        "binned_losses": {"0+4": [9.0, 9.0, 2.0, 5.0, 1.0, 3.0, None], "2+2": [0.0, 0.0, 1.0, 1.0, 1.0, 5.0, None]},
    }
    costs = cost_by_position(report, "0+4", "2+2")
    assert [cost for _, cost in costs] == [1.0, 1.0, -2.0]
    assert costs[0][0] == 32**0.5


def test_trial_runs_are_shown_at_the_quarters_of_training():
    from report import tried

    checkpoints = [
        {
            "sink_rate": {"sink token 1": i / 10, "sink token 2": (i > 5) / 2, "no token": 0.6 - i / 10},
            "perplexity": {"0+8": 10 + i, "4+4": 10},
            "tokens": 1_075_000 * (i + 1),
        }
        for i in range(8)
    ]
    train = {"seq_length": 256, "num_steps": 1, "batch_size_tokens": 8}
    config = {"train": train, "optimizer": {"lr": 0.016, "weight_decay": 0.25}}
    run = {"config": config, "tokens": 8_600_000, "validation_loss": [[8_600_000, 3.5]]}
    run |= {"sinks": {"checkpoints": checkpoints}}
    whole = run | {"forming": {"checkpoints": checkpoints}}
    row, without = tried({"vanilla": whole, "not evaluated": {}, "rates alone": run}).splitlines()[-2:]
    assert row.startswith(
        "| vanilla | 9 | 256 | 0.016 | 0.25 | 3.5000 | sink token 1 | 10 → 30 → 50 → 70 "
        "| 1.100 → 1.300 → 1.500 → 1.700 |"
    )
    assert without.endswith("| 10 → 30 → 50 → 70 |  |  |")
    unfinished = run | {"forming": {"checkpoints": checkpoints[:-1]}}
    assert " 1.100 → 1.300 → 1.500 → – |" in tried({"vanilla": unfinished}).splitlines()[-1]


def test_local_paths_are_not_collected(tmp_path):
    from results import collect

    write_run(tmp_path, "vanilla", [4.0], [1.0, 1.0, 1.0])
    config = {"data": {"path": "here"}, "train": {"run_dir": "there", "num_steps": 1}}
    (tmp_path / "runs" / "vanilla" / "config.yaml").write_text(yaml.safe_dump(config))
    assert collect(tmp_path)["runs"]["vanilla"]["config"] == {"data": {}, "train": {"num_steps": 1}}


def test_the_data_fingerprint_of_a_run_is_collected(tmp_path):
    from results import collect

    write_run(tmp_path, "vanilla", [4.0], [1.0, 1.0, 1.0])
    assert "data_fingerprint" not in collect(tmp_path)["runs"]["vanilla"]
    write_checkpoint(tmp_path / "runs" / "vanilla", 1)
    complete = tmp_path / "runs" / "vanilla" / "checkpoints" / "step-1" / "COMPLETE"
    complete.unlink()
    assert "data_fingerprint" not in collect(tmp_path)["runs"]["vanilla"]  # the checkpoint is not complete
    complete.touch()
    assert collect(tmp_path)["runs"]["vanilla"]["data_fingerprint"] == "ab12"


def test_a_loss_curve_consists_of_means_over_intervals(tmp_path):
    from results import NUM_LOSS_POINTS, collect

    losses = [1.0, 3.0] * NUM_LOSS_POINTS
    write_run(tmp_path, "vanilla", losses, [1.0, 1.0, 1.0])
    run = collect(tmp_path)["runs"]["vanilla"]
    assert run["loss"] == [[1024 * (i + 1), 2.0] for i in range(NUM_LOSS_POINTS)]
    assert run["validation_loss"] == [[512 * len(losses), 3.5]]


def write_checkpoint(run: Path, step: int) -> None:
    checkpoint = run / "checkpoints" / f"step-{step}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text('{"data_fingerprint": "ab12"}')
    (checkpoint / "COMPLETE").touch()


@pytest.mark.parametrize("name", ["streaming.json", "zero_shot.json"])
def test_results_of_an_earlier_checkpoint_are_refused(name, tmp_path):
    from results import collect

    write_run(tmp_path, "vanilla", [4.0, 3.5], [1.0, 1.0, 1.0])
    run, results = tmp_path / "runs" / "vanilla", tmp_path / "results" / "vanilla"
    write_checkpoint(run, 2)
    collect(tmp_path)
    report = json.loads((results / "streaming.json").read_text()) | {"tasks": {}, "num_samples": {}}
    report["model"]["folder"] = str(run / "checkpoints" / "step-1" / "model")
    (results / name).write_text(json.dumps(report))
    with pytest.raises(ValueError, match=rf"{name} is of step-1, and .* has step-2: delete {results} and evaluate"):
        collect(tmp_path)


def test_only_finished_runs_are_evaluated(tmp_path, monkeypatch, capsys):
    import evaluate

    for name, step in (("vanilla", 2), ("gate", 1)):
        write_run(tmp_path, name, [4.0, 3.5], [1.0, 1.0, 1.0])
        write_checkpoint(tmp_path / "runs" / name, step)
    started = []

    class Queue:
        def __init__(self, jobs, **options):
            started.extend(job.name for job in jobs)

        def run(self) -> bool:
            return True

    monkeypatch.setattr(evaluate, "JobQueue", Queue)
    monkeypatch.setattr(sys, "argv", ["evaluate", str(tmp_path), "--text", "book.txt", "--kinds", "sinks"])
    with pytest.raises(SystemExit, match="True"):
        evaluate.main()
    assert started == ["vanilla sinks"]
    assert "not evaluated, because their training is not finished: gate; run train.py" in capsys.readouterr().out


def test_speed_and_memory_are_those_of_the_last_steps(tmp_path, monkeypatch):
    from results import collect

    monkeypatch.setattr("results.NUM_SPEED_STEPS", 3)
    write_run(tmp_path, "vanilla", [4.0] * 5, [1.0, 1.0, 1.0])
    run = collect(tmp_path)["runs"]["vanilla"]
    assert (run["tokens_per_second"], run["memory_gib"], run["mfu"]) == (400.0, 4, None)


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("train", ["nope.yaml", "study"], r"cannot read the plan nope\.yaml"),
        ("train", ["list.yaml", "study"], r"list\.yaml is not a plan"),
        ("train", [str(FOLDER / "arms.yaml"), "study", "--only", "vanila"], "--only contains vanila"),
        ("evaluate", ["nope", "--text", "book.txt"], "nope/runs contains no such run"),
        ("forming", ["nope", "--text", "book.txt", "--output", "out"], "nope contains no complete checkpoint"),
        ("report", ["nope", "--output", "out"], "nope/runs contains no run"),
    ],
)
def test_mistakes_are_one_line(script, arguments, message, tmp_path, monkeypatch):
    (tmp_path / "list.yaml").write_text("- vanilla")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        runpy.run_path(str(FOLDER / f"{script}.py"), run_name="__main__")


def test_the_forming_of_sinks_is_measured_at_each_checkpoint(tmp_path, monkeypatch):
    shipped = FOLDER.parent / "examples" / "checkpoints"
    facts = {"data_fingerprint": "", "world_size": 1, "zero_stage": 1, "precision": "fp32"}
    for step in (1, 2):
        checkpoint = tmp_path / "run" / "checkpoints" / f"step-{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "model").symlink_to(shipped / "vanilla")
        (checkpoint / "state.json").write_text(json.dumps({"step": step, "positions": 8 * step, **facts}))
        (checkpoint / "COMPLETE").touch()
    arguments = ["run", "--text", str(shipped / "book.txt"), "--tokens", "150", "--output", "results"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["forming", *arguments])
    runpy.run_path(str(FOLDER / "forming.py"), run_name="__main__")
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["forming.json"]
    checkpoints = json.loads((tmp_path / "results" / "forming.json").read_text())["checkpoints"]
    assert [checkpoint["tokens"] for checkpoint in checkpoints] == [8, 16]
    assert list(checkpoints[0]["perplexity"]) == ["0+128", "1+127", "2+126", "4+124"]


def test_the_plans_that_scripts_use_exist():
    for script in FOLDER.glob("*.py"):
        for plan in re.findall(r"\bstudy/[\w-]+\.yaml", script.read_text(encoding="utf-8")):
            assert (FOLDER.parent / plan).exists()


# -- benchmarks/muon_report.py ---------------------------------------------------------------------


def test_muon_is_compared_at_equal_tokens_and_at_equal_time(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER.parent / "benchmarks"))
    from muon_report import loss_at, tables

    models = [
        {
            "name": f"{optimizer}-sink-seed-{seed}",
            "optimizer": optimizer,
            "sink": "sink",
            "seed": seed,
            "tokens": 100,
            "tokens_per_second": speed,
            "validation_loss": [[50, 4.0], [100, last]],
            "sink_rate": {"sink token": 0.5, "first text token": 0.25},
            "perplexity": {"0+8": 12.0, "1+7": 11.0},
            "massive_activations": [],
            "largest_over_median": 7.0,
        }
        for seed in (1, 2)
        for optimizer, speed, last in (("adamw", 10.0, 3.5), ("muon", 9.0, 3.0 + 0.1 * seed))
    ]
    found = tables({"models": models, "speed": None})
    adamw, muon = found["models"].splitlines()[2:4]
    rest = "| 50.0 | 25.0 | 0 | 7 | 12.00 | 11.00 |"
    assert adamw == f"| adamw-sink-seed-1 | 3.5000 | 3.5000 | 10 {rest}"
    assert muon == f"| muon-sink-seed-1 | 3.1000 | 3.2800 | 9 {rest}"  # after 90 tokens
    assert "| 3.1900 |" in tables({"models": models, "speed": 0.95})["models"].splitlines()[3]
    same = "| 50.0 ± 0.0 | 50.0 ± 0.0 | 7.0 ± 0.0 | 7.0 ± 0.0 |"
    minus = "\N{MINUS SIGN}"
    (row,) = found["differences"].splitlines()[2:]
    assert row == f"| sink | 2 | {minus}0.3500 ± 0.0500 | {minus}0.1800 ± 0.0400 {same}"
    assert loss_at(10, models[0]["validation_loss"]) == 4.0
    assert loss_at(110, models[0]["validation_loss"]) == 3.5
