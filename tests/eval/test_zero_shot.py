"""lm-eval's results against reference values, and against lm-eval on the exported model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from sinklm.checkpoints import load_model, load_tokenizer
from sinklm.checkpoints.export import export_model
from sinklm.cli.evaluate import zero_shot
from sinklm.eval.zero_shot import TASK_FOLDER, as_lm, evaluate, results_table
from sinklm.models.arms import ARMS

from ..models.tiny import plain_twin
from ..streaming.oracle import dense_logits
from .checkpoints import small_model

PAPER_TASKS = {"arc_challenge", "arc_easy", "hellaswag", "lambada_openai", "openbookqa", "piqa", "winogrande"}
REQUESTS = [
    ("The old man went", " down to the sea"),
    ("", "A text without any context"),
    ("Short", " one"),
    ("word " * 300 + "the context is longer than what the model was trained on", " and the sinks stay in front of it"),
]


def by_hand(model, ids: list[int], num_scored: int) -> float:
    """Log-likelihood of the last ids after the sink tokens, by transformers' model."""
    stream = torch.tensor([*model.config.sink_token_ids, *ids])
    with torch.no_grad():
        log_probs = plain_twin(model)(stream[None, :-1]).logits[0].log_softmax(-1)
    return log_probs.gather(1, stream[1:, None])[-num_scored:].sum().item()


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, argument, i) for i, argument in enumerate(arguments)]


@pytest.mark.parametrize("num_sinks", [0, 1, 2])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_loglikelihoods_equal_those_by_hand(checkpoints, num_sinks, batch_size):
    model, tokenizer = load_model(checkpoints[num_sinks]), load_tokenizer(checkpoints[num_sinks])
    room = model.config.max_position_embeddings - num_sinks
    lm = as_lm(model, tokenizer, batch_size=batch_size)

    measured = lm.loglikelihood(requests("loglikelihood", REQUESTS), disable_tqdm=True)

    for (context, continuation), (log_likelihood, _) in zip(REQUESTS, measured, strict=True):
        target = tokenizer(continuation)["input_ids"]
        # lm-eval truncates on the left; the last token is only a target
        ids = [*(tokenizer(context)["input_ids"] or [tokenizer.eos_token_id]), *target][-(room + 1) :]
        assert log_likelihood == pytest.approx(by_hand(model, ids, len(target)), abs=1e-4)


@pytest.mark.parametrize("num_sinks", [0, 1])
def test_an_answer_longer_than_the_trained_length_is_scored_if_max_length_allows(checkpoints, num_sinks):
    model, tokenizer = load_model(checkpoints[num_sinks]), load_tokenizer(checkpoints[num_sinks])
    answer = " down to the sea" * model.config.max_position_embeddings
    ids = [*tokenizer("The old man went")["input_ids"], *tokenizer(answer)["input_ids"]]
    lm = as_lm(model, tokenizer, max_length=len(ids) + num_sinks)

    ((log_likelihood, _),) = lm.loglikelihood(
        requests("loglikelihood", [("The old man went", answer)]), disable_tqdm=True
    )

    assert log_likelihood == pytest.approx(by_hand(model, ids, len(tokenizer(answer)["input_ids"])), rel=1e-5)


@pytest.mark.parametrize("kind", ARMS)
def test_an_arm_is_scored_as_by_hand(kind, checkpoints):
    model, tokenizer = small_model(0, sink={"kind": kind}), load_tokenizer(checkpoints[0])
    lm = as_lm(model, tokenizer, batch_size=3)
    measured = lm.loglikelihood(requests("loglikelihood", REQUESTS[:3]), disable_tqdm=True)
    for (context, continuation), (log_likelihood, _) in zip(REQUESTS, measured, strict=False):
        target = tokenizer(continuation)["input_ids"]
        ids = torch.tensor([*(tokenizer(context)["input_ids"] or [tokenizer.eos_token_id]), *target])
        log_probs = dense_logits(model.double(), ids[:-1]).log_softmax(-1)
        expected = log_probs.gather(1, ids[1:, None])[-len(target) :].sum().item()
        assert log_likelihood == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("num_sinks", [0, 1, 2])
def test_rolling_loglikelihood_scores_each_token_once_in_windows_with_sinks(checkpoints, num_sinks):
    model, tokenizer = load_model(checkpoints[num_sinks]), load_tokenizer(checkpoints[num_sinks])
    text = " ".join(f"Line {i} of a text longer than two windows;" for i in range(20))
    ids, room = tokenizer(text)["input_ids"], model.config.max_position_embeddings - num_sinks
    assert 2 * room < len(ids)

    (measured,) = as_lm(model, tokenizer).loglikelihood_rolling(
        requests("loglikelihood_rolling", [(text,)]), disable_tqdm=True
    )

    stream, expected = [tokenizer.eos_token_id, *ids], 0.0
    for start in range(0, len(ids), room):
        end = min(start + room, len(ids))
        context = stream[max(0, end - room) : start + 1]  # the last window is filled from the left
        expected += by_hand(model, [*context, *ids[start:end]], end - start)
    assert measured == pytest.approx(expected, rel=1e-5)


def test_the_papers_tasks_are_one_group(tmp_path, checkpoints, task_folder):
    """Local files override lm-eval's tasks of the same name, so the group needs no network."""
    for name in PAPER_TASKS:
        source = "last_word" if name == "lambada_openai" else "rooms"
        task = (task_folder / f"{source}.yaml").read_text().replace(f"task: {source}", f"task: {name}")
        (tmp_path / f"{name}.yaml").write_text(task)

    results = evaluate(load_model(checkpoints[1]), load_tokenizer(checkpoints[1]), include_path=tmp_path, limit=4)

    assert set(results["tasks"]) == PAPER_TASKS
    assert {samples["effective"] for samples in results["num_samples"].values()} == {4}
    accuracies = [task["acc"] for task in results["tasks"].values()]
    assert results["groups"]["sinklm_paper"]["acc"] == pytest.approx(sum(accuracies) / 7)
    table = results_table(results, "title")
    assert [str(cell) for cell in table.columns[0].cells][-1] == "sinklm_paper"
    assert (TASK_FOLDER / "sinklm_paper.yaml").exists()


def test_the_command_writes_metrics_model_and_versions(tmp_path, checkpoints, task_folder, capsys):
    zero_shot(str(checkpoints[1]), "rooms,last_word", include_path=task_folder, output=tmp_path)

    report = json.loads((tmp_path / "zero_shot.json").read_text())
    assert set(report["tasks"]["rooms"]) >= {"acc", "acc_stderr", "acc_norm", "brier_score"}
    assert report["num_samples"]["rooms"]["effective"] == 7
    assert report["model"]["num_sinks"] == 1
    assert report["limit"] is None
    assert report["versions"]["lm-eval"]
    shown = capsys.readouterr().out
    assert f"{report['tasks']['rooms']['brier_score']:.4f}" in shown
    assert str(tmp_path / "zero_shot.json") in shown.replace("\n", "")


STOCK = """
import json, sys
sys.modules["sinklm"] = None  # any import of it fails
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

folder, *exports = sys.argv[1:]
tasks = TaskManager(include_path=folder, include_defaults=False)
for export in exports:
    output = simple_evaluate("hf", f"pretrained={export}", ["rooms", "last_word"], device="cpu", task_manager=tasks)
    with open(f"{export}/scores.json", "w") as file:
        json.dump(output["results"], file)
"""


@pytest.mark.slow
def test_stock_lm_eval_gives_the_export_the_same_scores(tmp_path, checkpoints, task_folder):
    exports = {n: export_model(checkpoints[n], tmp_path / str(n)) for n in (1, 2)}
    command = [sys.executable, "-c", STOCK, str(task_folder), *map(str, exports.values())]
    subprocess.run(command, check=True, cwd=tmp_path)

    for num_sinks, export in exports.items():
        model, tokenizer = load_model(checkpoints[num_sinks]), load_tokenizer(checkpoints[num_sinks])
        ours = evaluate(model, tokenizer, ["rooms", "last_word"], include_path=task_folder)["tasks"]
        stock = json.loads((export / "scores.json").read_text())
        for task, metrics in {"rooms": ("acc", "acc_norm", "brier_score"), "last_word": ("acc", "perplexity")}.items():
            for metric in metrics:
                assert ours[task][metric] == pytest.approx(stock[task][f"{metric},none"], rel=1e-4), (task, metric)


def test_a_missing_task_folder_and_a_wrong_batch_size_are_named(checkpoints):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        zero_shot(str(checkpoints[0]), "piqa", include_path=Path("nowhere"))
    with pytest.raises(ValueError, match="--batch-size"):
        zero_shot(str(checkpoints[0]), batch_size="many")


def test_an_unknown_task_is_named(checkpoints, monkeypatch):
    without_defaults = TaskManager(include_path=TASK_FOLDER, include_defaults=False)
    # lm-eval's own 13,000 task files take a quarter of a minute to read
    monkeypatch.setattr("sinklm.eval.zero_shot.TaskManager", lambda **kwargs: without_defaults)
    model, tokenizer = load_model(checkpoints[0]), load_tokenizer(checkpoints[0])
    with pytest.raises(ValueError, match="no task 'hellaswog'"):
        evaluate(model, tokenizer, ["hellaswog"])


def test_without_network_the_error_suggests_local_files(checkpoints, task_folder, tmp_path):
    task = (task_folder / "rooms.yaml").read_text().replace("dataset_path: json", "dataset_path: somebody/something")
    (tmp_path / "rooms.yaml").write_text(task)
    model, tokenizer = load_model(checkpoints[0]), load_tokenizer(checkpoints[0])
    with pytest.raises(ConnectionError, match="--include-path"):
        evaluate(model, tokenizer, ["rooms"], include_path=tmp_path)
