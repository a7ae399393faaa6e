"""lm-eval's results against reference values, and against lm-eval on the exported model."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from sinklm.checkpoints import load_model, load_tokenizer
from sinklm.checkpoints.export import export_model
from sinklm.cli.evaluate import zero_shot
from sinklm.eval import zero_shot as module
from sinklm.eval.compare import compare
from sinklm.eval.lm import as_lm, parse_options
from sinklm.eval.report import describe_model
from sinklm.eval.zero_shot import TASK_FOLDER, evaluate, find_tasks, results_table, task_manager, write_samples
from sinklm.models.arms import ARMS

from ..models.tiny import plain_twin
from ..streaming.oracle import dense_logits
from ..train.processes import Ranks, run_module
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
        # without context, a text follows the sinks alone; without sinks, the end-of-text token
        nothing = [] if num_sinks else [tokenizer.eos_token_id]
        ids = [*(tokenizer(context)["input_ids"] or nothing), *target][-(room + 1) :]
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

    stream, expected = [None if num_sinks else tokenizer.eos_token_id, *ids], 0.0
    for start in range(0, len(ids), room):
        end = min(start + room, len(ids))
        context = stream[max(0, end - room) : start + 1]  # the last window is filled from the left
        context = [token for token in context if token is not None]  # the first token follows the sinks
        expected += by_hand(model, [*context, *ids[start:end]], end - start)
    assert measured == pytest.approx(expected, rel=1e-5)


def test_a_metric_that_is_not_a_number_does_not_lose_the_others(
    tmp_path, checkpoints, task_folder, monkeypatch, capsys
):
    """JSON has no NaN. The metric is null in the report, and eval compare leaves it out."""
    original = module.simple_evaluate

    def with_nan(*arguments, **options):
        output = original(*arguments, **options)
        output["results"]["rooms"] |= {"odd,none": float("nan"), "odd_stderr,none": float("inf")}
        return output

    monkeypatch.setattr(module, "simple_evaluate", with_nan)
    zero_shot(str(checkpoints[1]), "rooms", include_path=task_folder, output=tmp_path, quiet=True)
    assert "not a number" in capsys.readouterr().out
    report = json.loads((tmp_path / "zero_shot.json").read_text())
    assert report["tasks"]["rooms"]["odd"] is report["tasks"]["rooms"]["odd_stderr"] is None
    assert 0 <= report["tasks"]["rooms"]["acc"] <= 1
    measured = compare([tmp_path, tmp_path])
    assert not any("odd" in str(row) for row in measured.rows)


def test_samples_of_tasks_with_names_alike_are_separate_files(tmp_path):
    names = ["日本", "中国", "a b", "a-b", "a/b"]
    paths = write_samples({name: [{"doc_id": 0, "task": name}] for name in names}, tmp_path)
    assert [json.loads(path.read_text())["task"] for path in paths] == names
    expected = ["日本", "中国", "a-b", "a-b_2", "a-b_3"]
    assert [path.name for path in paths] == [f"samples_{name}.jsonl" for name in expected]


def test_the_papers_tasks_are_one_group(tmp_path, checkpoints, task_folder):
    """Local files override lm-eval's tasks of the same name, so the group needs no network."""
    for name in PAPER_TASKS:
        source = "last_word" if name == "lambada_openai" else "rooms"
        task = (task_folder / f"{source}.yaml").read_text().replace(f"task: {source}", f"task: {name}")
        (tmp_path / f"{name}.yaml").write_text(task)

    model, tokenizer = load_model(checkpoints[1]), load_tokenizer(checkpoints[1])
    results = evaluate(model, tokenizer, find_tasks(include_path=tmp_path), limit=4)

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
    assert report["length"] == load_model(checkpoints[1]).config.max_position_embeddings
    assert report["versions"]["lm-eval"]
    shown = capsys.readouterr().out
    assert f"{report['tasks']['rooms']['brier_score']:.4f}" in shown
    assert f"Results in {tmp_path}: zero_shot.json" in shown.replace("\n", "")


def test_the_prompts_and_the_questions_are_hashed_apart(checkpoints, task_folder, tmp_path):
    """Other few-shot examples, or another wording, change the prompts but not the questions."""
    task = (task_folder / "rooms.yaml").read_text()
    (tmp_path / "rooms.yaml").write_text(task.replace("Question:", "Query:"))
    model, tokenizer = load_model(checkpoints[1]), load_tokenizer(checkpoints[1])
    one, same, other = (
        evaluate(model, tokenizer, find_tasks(["rooms"], include_path=folder), limit=2)
        for folder in (task_folder, task_folder, tmp_path)
    )
    for key in ("questions_sha256", "prompts_sha256"):
        assert one[key] == same[key]
    assert one["questions_sha256"] == other["questions_sha256"]
    assert one["prompts_sha256"] != other["prompts_sha256"]


@pytest.fixture(scope="module")
def exports(tmp_path_factory, checkpoints) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("exports")
    return {n: export_model(checkpoints[n], folder / str(n)) for n in (1, 2)}


@pytest.mark.parametrize("num_sinks", [1, 2])
def test_an_export_gets_the_scores_of_its_checkpoint(checkpoints, exports, num_sinks):
    """Empty and truncated contexts, rolling windows and generated text included."""
    models = [load_model(checkpoints[num_sinks]), load_model(exports[num_sinks])]
    ours, exported = (
        as_lm(model, load_tokenizer(folder), batch_size=3)
        for model, folder in zip(models, (checkpoints[num_sinks], exports[num_sinks]), strict=True)
    )
    for kind, arguments in (
        ("loglikelihood", REQUESTS),
        ("loglikelihood_rolling", [("A text that is longer than two windows; " * 40,), ("Short",)]),
    ):
        scores = [getattr(lm, kind)(requests(kind, arguments), disable_tqdm=True) for lm in (ours, exported)]
        assert torch.tensor(scores[0]).flatten().tolist() == pytest.approx(torch.tensor(scores[1]).flatten().tolist())
    prompts = [(text, {"until": ["\n\n\n"], "max_gen_toks": 12}) for text in ("The old man", "A", "word " * 300)]
    written = [lm.generate_until(requests("generate_until", prompts), disable_tqdm=True) for lm in (ours, exported)]
    assert written[0] == written[1]
    assert any(written[0])


def test_stock_lm_eval_scores_an_export_as_its_checkpoint_also_without_context(checkpoints, exports):
    ours = as_lm(load_model(checkpoints[1]), load_tokenizer(checkpoints[1]), batch_size=3)
    stock = HFLM(pretrained=load_model(exports[1]), tokenizer=load_tokenizer(exports[1]), batch_size=3)
    scores = [lm.loglikelihood(requests("loglikelihood", REQUESTS[:3]), disable_tqdm=True) for lm in (ours, stock)]
    assert [s for s, _ in scores[0]] == pytest.approx([s for s, _ in scores[1]])


def test_a_report_names_the_sinks_of_an_export(checkpoints, exports):
    ours, exported = (describe_model(load_model(path), path) for path in (checkpoints[2], exports[2]))
    assert ours["sink_token_ids"] == exported["sink_token_ids"] != []
    assert (ours["sink_kind"], ours["num_sinks"], ours["sinks_added_by"]) == ("token", 2, "model")
    assert (exported["sink_kind"], exported["num_sinks"], exported["sinks_added_by"]) == ("token", 2, "tokenizer")
    assert describe_model(load_model(checkpoints[0]), checkpoints[0])["sinks_added_by"] is None


def test_the_chat_template_formats_prompts_and_samples_are_logged(tmp_path, checkpoints, task_folder):
    folder = shutil.copytree(checkpoints[1], tmp_path / "model")
    options = {"include_path": task_folder, "apply_chat_template": True, "log_samples": True, "output": tmp_path}
    with pytest.raises(ValueError, match="no chat template"):
        zero_shot(str(folder), "rooms", **options)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}User: {{ m.content }}\nBot:{% endfor %}")

    zero_shot(str(folder), "rooms", **options)

    samples = [json.loads(line) for line in (tmp_path / "samples_rooms.jsonl").read_text().splitlines()]
    report = json.loads((tmp_path / "zero_shot.json").read_text())
    assert [sample["doc_id"] for sample in samples] == list(range(7))
    assert samples[0]["arguments"][0][0] == "User: Question: Where does one cook a meal?\nAnswer:\nBot:"
    assert sum(sample["acc"] for sample in samples) / 7 == pytest.approx(report["tasks"]["rooms"]["acc"])
    assert report["apply_chat_template"] is True


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("logits_cache", "KEY=VALUE"),
        ("dtype=float16", "use --dtype"),
        ("revision=main", "revision has no effect"),
        ("logit_cache=1", "logit_cache is unknown: use only add_bos_token"),
        ("softmax_dtype=int8", "softmax_dtype is 'int8': it must be float32"),
        ("mixed_precision_dtype=float8_e4m3fn", "mixed_precision_dtype is 'float8_e4m3fn': it must be"),
        ("softmax_dtype=nn", "softmax_dtype is 'nn'"),
        ("max_batch_size=many", "max_batch_size is 'many': it must be a number"),
        ("logits_cache=often", "logits_cache is 'often': it must be True or False"),
    ],
)
def test_model_arguments_without_effect_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_options(text)


def test_model_arguments_reach_lm_eval(checkpoints):
    model, tokenizer = load_model(checkpoints[1]), load_tokenizer(checkpoints[1])
    lm = as_lm(model, tokenizer, **parse_options("softmax_dtype=float64,logits_cache=False"))
    assert lm.softmax_dtype == torch.float64
    assert lm.logits_cache is False
    with pytest.raises(ValueError, match=r"--max-length is 2: .* at least 3"):
        as_lm(model, tokenizer, max_length=2)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=500, n_embd=16, n_layer=1, n_head=1, n_positions=64))
    assert as_lm(gpt2, tokenizer, max_length=64).max_length == 64
    with pytest.raises(ValueError, match="--max-length is 65, but the model has only 64 positions: lower it"):
        as_lm(gpt2, tokenizer, max_length=65)
    no_text = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match=r"no begin-of-text and no end-of-text token, .*: set \"eos_token\" in"):
        as_lm(gpt2, no_text)
    with pytest.raises(ValueError, match="no effect on a model with sink tokens"):
        as_lm(model, tokenizer, add_bos_token=True)
    with pytest.raises(ValueError, match="max_batch_size has no effect with --batch-size 4: leave out one"):
        as_lm(model, tokenizer, batch_size=4, max_batch_size=2)


def test_options_of_tasks_without_effect_are_refused(checkpoints, task_folder, tmp_path):
    task = (task_folder / "rooms.yaml").read_text()
    (tmp_path / "fixed.yaml").write_text(task.replace("task: rooms", "task: fixed\nnum_fewshot: 0"))
    (tmp_path / "pair.yaml").write_text("group: pair\ntask: [fixed]")
    find_tasks(["fixed"], include_path=tmp_path, num_fewshot=0)
    find_tasks(["pair"], include_path=tmp_path, num_fewshot=2)  # other tasks of a group may have examples
    find_tasks(["rooms", str(task_folder / "rooms.yaml")], include_path=task_folder, num_fewshot=2)
    with pytest.raises(ValueError, match="--num-fewshot has no effect on fixed, whose file sets it to 0: leave out"):
        find_tasks(["fixed"], include_path=tmp_path, num_fewshot=2)
    options = {"include_path": task_folder, "model_args": "enable_thinking=False", "output": tmp_path}
    with pytest.raises(
        ValueError, match="enable_thinking without --apply-chat-template has no effect: add this option"
    ):
        zero_shot(str(checkpoints[1]), "rooms", **options)


@pytest.mark.parametrize("num_sinks", [0, 1])
def test_requests_that_do_not_fit_name_the_length(checkpoints, num_sinks):
    model, tokenizer = load_model(checkpoints[num_sinks]), load_tokenizer(checkpoints[num_sinks])
    lm = as_lm(model, tokenizer, max_length=2 + num_sinks)
    num_tokens = len(tokenizer(" down to the sea")["input_ids"])
    with pytest.raises(ValueError, match=f"set --max-length to at least {num_tokens + num_sinks}"):
        lm.loglikelihood(requests("loglikelihood", [("The old man", " down to the sea")]), disable_tqdm=True)
    with pytest.raises(ValueError, match="Raise --max-length"):
        lm.generate_until(requests("generate_until", [("A", {"max_gen_toks": 12})]), disable_tqdm=True)
    fits = as_lm(model, tokenizer, max_length=num_tokens + num_sinks)
    assert fits.loglikelihood(requests("loglikelihood", [("The old man", " down to the sea")]), disable_tqdm=True)


def test_the_batch_size_is_found_by_itself(checkpoints, monkeypatch):
    """lm-eval's search, as on a GPU on which more than five requests do not fit."""
    model, tokenizer = load_model(checkpoints[1]), load_tokenizer(checkpoints[1])
    expected = as_lm(model, tokenizer, batch_size=1).loglikelihood(requests("loglikelihood", REQUESTS), True)
    lm = as_lm(model, tokenizer, max_batch_size=7)
    assert lm.batch_size == 7  # not searched on a CPU
    assert as_lm(model, tokenizer).batch_size == 8
    lm.batch_size_per_gpu = "auto"
    call, sizes = lm._model_call, []

    def small_memory(inps, **options):
        if len(inps) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        sizes.append(len(inps))
        return call(inps, **options)

    monkeypatch.setattr(lm, "_model_call", small_memory)
    measured = lm.loglikelihood(requests("loglikelihood", REQUESTS * 3), disable_tqdm=True)
    assert max(sizes) == 5
    assert [score for score, _ in measured] == pytest.approx([score for score, _ in expected * 3])


@pytest.mark.slow
def test_two_processes_give_the_results_of_one(tmp_path, checkpoints, task_folder):
    arguments = ["--tasks", "rooms,last_word", "--include-path", task_folder, "--log-samples", "--device", "cpu"]
    arguments = ["eval", "zero-shot", checkpoints[1], *arguments, "--output", tmp_path / "two"]
    finished = Ranks(run_module, "sinklm", list(map(str, arguments)), world_size=2).wait()
    assert [status for status, _ in finished] == [0, 0], finished
    assert ["Results in" in output for _, output in finished] == [True, False]

    zero_shot(str(checkpoints[1]), "rooms,last_word", include_path=task_folder, log_samples=True, output=tmp_path)

    one, two = (json.loads((folder / "zero_shot.json").read_text()) for folder in (tmp_path, tmp_path / "two"))
    assert (one["num_processes"], two["num_processes"]) == (1, 2)
    assert two["num_samples"] == one["num_samples"]
    for task, metrics in one["tasks"].items():
        drawn = {"perplexity_stderr"}  # from resampled examples, whose order differs
        values = {name: value for name, value in metrics.items() if name not in drawn}
        assert {name: two["tasks"][task][name] for name in values} == pytest.approx(values, rel=1e-5)
    for task in ("rooms", "last_word"):
        samples = [
            [json.loads(line) for line in (folder / f"samples_{task}.jsonl").read_text().splitlines()]
            for folder in (tmp_path, tmp_path / "two")
        ]
        assert [s["doc_hash"] for s in samples[0]] == [s["doc_hash"] for s in samples[1]]


STOCK = """
import json, sys
sys.modules["sinklm"] = None  # any import of it fails
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

folder, *exports = sys.argv[1:]
tasks = TaskManager(include_path=folder, include_defaults=False)
options = {"tasks": ["rooms", "last_word"], "device": "cpu", "task_manager": tasks}
found = [simple_evaluate("hf", f"pretrained={export}", **options)["results"] for export in exports]
with open("scores.json", "w") as file:
    json.dump(found, file)
"""


@pytest.mark.slow
@pytest.mark.long  # `test_an_export_gets_the_scores_of_its_checkpoint` compares them in this process
def test_stock_lm_eval_gives_the_export_the_same_scores(tmp_path, checkpoints, exports, task_folder):
    """In a process without sinklm, which changes neither transformers nor lm-eval there."""
    command = [sys.executable, "-c", STOCK, str(task_folder), *map(str, exports.values())]
    subprocess.run(command, check=True, cwd=tmp_path)
    for num_sinks, stock in zip(exports, json.loads((tmp_path / "scores.json").read_text()), strict=True):
        model, tokenizer = load_model(checkpoints[num_sinks]), load_tokenizer(checkpoints[num_sinks])
        ours = evaluate(model, tokenizer, find_tasks(["rooms", "last_word"], include_path=task_folder))["tasks"]
        for task, metrics in {"rooms": ("acc", "acc_norm", "brier_score"), "last_word": ("acc", "perplexity")}.items():
            for metric in metrics:
                assert ours[task][metric] == pytest.approx(stock[task][f"{metric},none"], rel=1e-4), (task, metric)


def test_a_missing_task_folder_and_a_wrong_batch_size_are_named(checkpoints):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        zero_shot(str(checkpoints[0]), "piqa", include_path=Path("nowhere"))
    with pytest.raises(ValueError, match="--batch-size"):
        zero_shot(str(checkpoints[0]), batch_size="many")


def test_an_unknown_task_is_named(checkpoints, monkeypatch):
    papers = task_manager(["piqa"])
    # lm-eval's own 13,000 task files take a quarter of a minute to read
    monkeypatch.setattr("sinklm.eval.zero_shot.TaskManager", lambda **kwargs: papers)
    monkeypatch.setattr("sinklm.eval.loading.load_model", pytest.fail)  # the model need not be loaded to know
    with pytest.raises(ValueError, match=r"no task 'hellaswog': did you mean hellaswag"):
        zero_shot(str(checkpoints[0]), "piqa,hellaswog")


def test_without_network_the_error_suggests_local_files(checkpoints, task_folder, tmp_path):
    task = (task_folder / "rooms.yaml").read_text().replace("dataset_path: json", "dataset_path: somebody/something")
    (tmp_path / "rooms.yaml").write_text(task)
    model, tokenizer = load_model(checkpoints[0]), load_tokenizer(checkpoints[0])
    with pytest.raises(ConnectionError, match="--include-path"):
        evaluate(model, tokenizer, find_tasks(["rooms"], include_path=tmp_path))
