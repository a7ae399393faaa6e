"""The scripts of the small-scale study: their queue of jobs, and the tables made of what runs leave behind."""

import json
import sys
from pathlib import Path

import pytest
import yaml

FOLDER = Path(__file__).parents[2] / "examples" / "study"


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


def test_what_is_done_is_not_run_again(tmp_path, capsys):
    from jobs import JobQueue

    jobs = [job("once", tmp_path, f"open({str(tmp_path / 'count')!r}, 'a').write('x')")]
    assert JobQueue(jobs).run()
    assert JobQueue(jobs).run()
    assert (tmp_path / "count").read_text() == "x"


def test_time_ends_what_runs_and_starts_nothing_more(tmp_path, capsys):
    from jobs import JobQueue

    code = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit('saved')); print('up'); time.sleep(60)"
    jobs = [job(name, tmp_path, code) for name in ("first", "second", "third")]
    assert not JobQueue(jobs, minutes=1 / 60).run()
    assert "first: stopped: saved" in capsys.readouterr().out
    assert not jobs[2].unfinished_log.exists()


def write_run(folder: Path, name: str, losses: list[float], perplexities: list[float]) -> None:
    run, results = folder / "runs" / name, folder / "results" / name
    run.mkdir(parents=True)
    results.mkdir(parents=True)
    records = [
        {"step": i + 1, "loss": loss, "positions": 512 * (i + 1), "tokens_per_second": 100.0 * (i + 1)}
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
    report = {"model": {"num_parameters": 7}, "text": {"sha256": "", "num_tokens": 64}, "bin_edges": [0, 64]}
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


def test_a_run_that_ended_early_says_so_and_is_compared_with_vanilla_where_it_ended(tmp_path):
    from report import perplexity
    from results import collect

    write_run(tmp_path, "vanilla", [4.0, 3.5], [12.0, 11.0, 10.0])
    write_run(tmp_path, "gate", [4.04], [20.0, 10.0, 10.0])
    runs = collect(tmp_path)["runs"]
    runs["vanilla"]["validation_loss"].insert(0, [512, 4.5])
    assert perplexity(runs).splitlines()[2].startswith("| gate (50 % of training) | 4.5400 | +0.89 % |")


def test_what_was_tried_is_shown_at_the_quarters_of_training():
    from report import tried

    checkpoints = [
        {"sink_rate": {"first text token": i / 10}, "perplexity": {"0+8": 10 + i, "4+4": 10}} for i in range(8)
    ]
    train = {"seq_length": 256, "num_steps": 1, "batch_size_tokens": 8}
    config = {"train": train, "optimizer": {"lr": 0.016, "weight_decay": 0.25}}
    run = {"config": config, "tokens": 8, "validation_loss": [[1, 3.5]]}
    run |= {kind: {"checkpoints": checkpoints} for kind in ("sinks", "forming")}
    row = tried({"vanilla": run, "not evaluated": {}}).splitlines()[-1]
    assert row.startswith(
        "| vanilla | 256 | 0.016 | 0.25 | 3.5000 | 10 → 30 → 50 → 70 | 1.100 → 1.300 → 1.500 → 1.700 |"
    )


def test_places_of_the_machine_are_not_gathered(tmp_path):
    from results import collect

    write_run(tmp_path, "vanilla", [4.0], [1.0, 1.0, 1.0])
    config = {"data": {"path": "here"}, "train": {"run_dir": "there", "seed": 1}}
    (tmp_path / "runs" / "vanilla" / "config.yaml").write_text(yaml.safe_dump(config))
    assert collect(tmp_path)["runs"]["vanilla"]["config"] == {"data": {}, "train": {"seed": 1}}


def test_a_curve_of_losses_is_means_over_stretches(tmp_path):
    from results import NUM_LOSS_POINTS, collect

    losses = [1.0, 3.0] * NUM_LOSS_POINTS
    write_run(tmp_path, "vanilla", losses, [1.0, 1.0, 1.0])
    run = collect(tmp_path)["runs"]["vanilla"]
    assert run["loss"] == [[1024 * (i + 1), 2.0] for i in range(NUM_LOSS_POINTS)]
    assert run["validation_loss"] == [[512 * len(losses), 3.5]]


def test_a_table_replaces_the_one_between_its_marks(tmp_path):
    from report import write_page

    page = tmp_path / "paper.md"
    write_page(page, {"sinks": "| a |", "zero_shot": ""})
    page.write_text("# By hand\n\n" + page.read_text() + "\nmore by hand\n")
    write_page(page, {"sinks": r"| \1 |"})
    assert page.read_text() == "# By hand\n\n<!-- sinks -->\n| \\1 |\n<!-- end -->\n\nmore by hand\n"
