"""Scripts of `benchmarks/`: names of outputs, spreads beside means, calls that share a folder."""

import importlib
import json
import multiprocessing
import sys
from pathlib import Path
from statistics import median

import pytest
import torch

from benchmarks.fault_injection import wait
from benchmarks.part_report import PartReport, table, with_spread

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
ROW = {"size": "14m", "contestant": "sinklm", "ranks": 1, "micro_batch_size": 1, "tokens_per_second": 8.0}
ROW |= {"num_micro_batches": 1, "seconds_per_step": 0.25, "stdev": 0.0123, "memory_gib": 0.0, "start": 1.0}


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    """The folder of a script is on its path."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_an_output_with_a_dot_keeps_its_name(tmp_path, monkeypatch, capsys):
    from benchmarks import train

    monkeypatch.setattr(train, "write_random_store", lambda folder: folder)
    monkeypatch.setattr(train, "measure", lambda *arguments: ROW)
    for name in ("E1.4", "E1.5"):
        monkeypatch.setattr(sys, "argv", ["train.py", "--contestants", "sinklm", "--output", str(tmp_path / name)])
        train.main()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["E1.4.json", "E1.4.md", "E1.5.json", "E1.5.md"]
    assert json.loads((tmp_path / "E1.4.json").read_text())["rows"] == [ROW]
    assert "| 250.0 ± 12.3 |" in capsys.readouterr().out


def test_the_loop_of_the_peers_accumulates_the_gradient_of_the_whole_batch():
    from benchmarks import train_peers

    samples, found = torch.randn(4, 3), []
    for batches in ([samples], [samples[:2], samples[2:]]):
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 1)
        task = {"num_warmup_steps": 0, "num_steps": 1, "num_micro_batches": len(batches)}
        loss_of = lambda batch, model=model: model(batch).square().mean()  # noqa: E731
        train_peers.plain_loop(model, loss_of, iter(batches), train_peers.Clock(0), task)
        found.append(model.weight)
    torch.testing.assert_close(*found)
    torch.manual_seed(0)
    assert not torch.equal(found[0], torch.nn.Linear(3, 1).weight)


def test_windows_are_timed_with_their_spread_into_an_output_with_a_dot(tmp_path, monkeypatch, capsys):
    from benchmarks import windows

    sizes = "--size 14m --tokens 64 --window 15 --num-warmup-steps 0 --no-compile --layers full,drawn"
    for name in ("E1.4", "E1.5"):
        arguments = [*sizes.split(), "--lengths", "64", "--num-steps", "3", "--output", str(tmp_path / name)]
        monkeypatch.setattr(sys, "argv", ["windows.py", *arguments])
        windows.main()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["E1.4.json", "E1.4.md", "E1.5.json", "E1.5.md"]
    rows = json.loads((tmp_path / "E1.5.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["full", "drawn"]
    assert not any("error" in row for row in rows)
    steps = [f"| {1e3 * row['seconds']:.1f} ± {1e3 * row['stdev']:.1f} |" for row in rows]
    kernel = {"kind": "kernel", "name": "band", "length": 64, "seconds": 0.003}
    kernel |= {part: {"seconds": s, "stdev": s / 100} for part, s in (("forward", 0.001), ("backward", 0.002))}
    assert "| band | 64 | 1.000 ± 0.010 | 2.000 ± 0.020 | 3.000 |" in windows.table([kernel])
    written = (tmp_path / "E1.5.md").read_text()
    assert all(step in written for step in steps)
    assert written in capsys.readouterr().out


def test_a_table_has_spreads_beside_their_means():
    rows = [{"size": "14m", **with_spread("ms", [1.0, 2.0, 3.0]), "kernels": {}}, with_spread("ms", [4.0])]
    assert rows[0]["± ms"] == 1.0
    assert with_spread("ms", [1.0, 2.0, 6.0], median) == {"ms": 2.0, "± ms": pytest.approx(7**0.5)}
    assert table(rows) == "| size | ms |\n|---|---|\n| 14m | 2 ± 1 |\n|  | 4 |"


def test_an_error_with_bars_and_line_breaks_is_one_cell():
    from benchmarks import train, windows

    failed = {"name": "band", "length": 64, "error": "RuntimeError: a | b\nof c"}
    assert windows.table([failed | {"kind": "kernel"}]) == (
        "| attention of a layer | positions | error |\n|---|---|---|\n| band | 64 | RuntimeError: a \\| b of c |\n"
    )
    assert windows.table([failed | {"kind": "step"}]).startswith("| layers | positions | error |")
    failed = {"size": "14m", "contestant": "litgpt", "ranks": 1, "error": "RuntimeError: a | b\nof c"}
    headers, _, measured, error = train.table([ROW, failed]).splitlines()
    assert len({line.replace("\\|", "").count("|") for line in (headers, measured, error)}) == 1
    assert error.endswith("| RuntimeError: a \\| b of c |")


def test_calls_for_other_parts_and_sizes_add_to_a_report(tmp_path):
    path = tmp_path / "report.json"
    for number, (part, size) in enumerate([("steps", "1b"), ("steps", "14m"), ("curve", ""), ("steps", "1b")]):
        row = {"size": size, "number": number} if size else {"number": number}
        PartReport(path, {"call": number}, minutes=1.0).add(part, lambda row=row: [row], size)
    content = json.loads(path.read_text())
    assert content["parts"] == {
        "steps": [{"size": "14m", "number": 1}, {"size": "1b", "number": 3}],
        "curve": [{"number": 2}],
    }
    assert content["settings"] == {"steps 1b": {"call": 3}, "steps 14m": {"call": 1}, "curve": {"call": 2}}
    path.write_text(json.dumps(content | {"torch": "1.0"}))
    with pytest.raises(SystemExit, match=r"report\.json has results of torch 1\.0, not .*: pass another --output"):
        PartReport(path, {}, minutes=1.0)


def test_results_of_other_settings_are_not_used_for_quantized_caches(tmp_path, monkeypatch, capsys):
    from benchmarks import kv_quantization

    output, calls = tmp_path / "kv.json", []

    def perplexity(args, kv_dtype) -> dict:
        calls.append((args.window, kv_dtype))
        return {"perplexity": float(args.window)}

    monkeypatch.setattr(kv_quantization, "perplexity", perplexity)
    for window, kv_dtypes in ((60, "none int8"), (60, "none int8"), (30, "int8")):
        arguments = f"--parts perplexity --window {window} --kv-dtypes {kv_dtypes} -o {output}"
        monkeypatch.setattr(sys, "argv", ["kv_quantization.py", *arguments.split()])
        kv_quantization.main()
    assert calls == [(60, None), (60, "int8"), (30, "int8")]  # the second call has all results
    content = json.loads(output.read_text())
    windows = {name: settings["window"] for name, settings in content["settings"].items()}
    assert windows == {"perplexity none": "60", "perplexity int8": "30"}
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("perplexity of the model")]
    assert ["60.0000" in line for line in shown] == [True, True, False]


@pytest.mark.parametrize(
    ("code", "error", "message"),
    [
        ("import time; time.sleep(600)", TimeoutError, "has not ended after 1 s"),
        ("raise SystemExit(3)", RuntimeError, "ended with status 3"),
    ],
)
def test_a_rank_that_hangs_or_fails_ends_the_benchmark_with_its_log(code, error, message, tmp_path):
    log = tmp_path / "run-rank-1.log"
    log.write_text("error: no data\n")
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=exec, args=(text,), name=str(log)) for text in (code, "")]
    for rank in ranks:
        rank.start()
    ranks[1].join()
    with pytest.raises(error, match=rf"run-rank-1\.log: the process {message}; its last lines:\nerror: no data"):
        wait(ranks, 1.0 if error is TimeoutError else 60.0)
    assert not any(rank.is_alive() for rank in ranks)


def test_a_rank_may_fail_after_a_kill():
    rank = multiprocessing.get_context("spawn").Process(target=exec, args=("raise SystemExit(1)",))
    rank.start()
    wait([rank], 60.0, may_fail=True)
    assert rank.exitcode == 1


@pytest.mark.parametrize(
    ("script", "first", "same", "other", "named"),
    [
        (
            "muon_study",
            ["F", "--text", "a.txt", "data.path=s", "--minutes", "1e-9"],
            ["F", "--text", "a.txt", "data.path=s", "--minutes", "1e-8", "--seeds", "3"],
            ["F", "--text", "a.txt", "data.path=s", "--base", "paper"],
            "base study, not paper",
        ),
        (
            "recall_study",
            ["evaluate", "--folder", "F", "--num-samples", "100"],
            ["evaluate", "--folder", "F", "--num-samples", "100", "--cache-sizes", "64"],
            ["evaluate", "--folder", "F", "--num-samples", "50"],
            "num_samples 100, not 50",
        ),
        (
            "recall_study",
            ["collect", "--folder", "F"],
            ["evaluate", "--folder", "F", "--minutes", "0"],
            ["collect", "train.num_steps=3", "--folder", "F"],
            r"overrides \[\], not \['train.num_steps=3'\]",
        ),
        (
            "retrofit_study",
            ["F", "--text", "a.txt", "data.path=s", "--minutes", "0"],
            ["F", "--text", "a.txt", "data.path=s", "--minutes", "0", "--seeds", "3", "--lrs", "1e-3"],
            ["F", "--text", "a.txt", "data.path=s", "--window", "60"],
            "window 124, not 60",
        ),
        (
            "quantization_study",
            ["F", "data.path=s", "--minutes", "0"],
            ["F", "data.path=s", "--minutes", "0", "--arms", "gate", "--layers", "12"],
            ["F", "data.path=s", "--million-tokens", "3"],
            "million_tokens None, not 3.0",
        ),
    ],
)
def test_other_settings_need_another_folder(script, first, same, other, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").touch()
    module = importlib.import_module(script)
    monkeypatch.setattr(module, "require_extra", lambda name: None, raising=False)
    main = module.main
    for arguments in (first, same):
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code in (0, 1, 75)
    monkeypatch.setattr(sys, "argv", [script, *other])
    with pytest.raises(SystemExit, match=rf"^F was begun with {named}: use another folder"):
        main()


def test_a_memory_is_measured(tmp_path, monkeypatch):
    from benchmarks import stream_memory

    model, output = Path(__file__).parents[1] / "examples/checkpoints/learnable-sink", tmp_path / "memory.json"
    sizes = "--num-kept 1 --window 40 --block-size 8 --num-blocks 2 --distances 20 90 --num-samples 2 --num-tokens 99"
    sizes += " --num-lines 21 --line-distances 3 15"
    arguments = ["memory", str(model), "--text", str(model.parent / "book.txt"), *sizes.split(), "-o", str(output)]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(stream_memory, "NUM_STEPS", 5)
    stream_memory.main()
    parts = json.loads(output.read_text())["parts"]
    assert not any("error" in row for rows in parts.values() for row in rows)
    names = ["cache 1+40", "memory 1+40, 2x8", "random 1+40, 2x8", "oracle 1+40, 2x8"]
    assert [row["size"] for row in parts["recall"]] == [row["size"] for row in parts["lines"]] == names
    assert [row["questions"] for row in parts["lines"]] == [{"3": 4, "15": 2}] * 4
    assert [row["bytes on host"] > 0 for row in parts["speed"]] == [False, True]


def test_an_oracle_chooses_the_blocks_with_the_key():
    from benchmarks.stream_memory import oracle_weights
    from sinklm.streaming import MemoryOptions
    from sinklm.streaming.layer_memory import LayerMemory
    from sinklm.streaming.rule import StreamShape

    memory = LayerMemory(MemoryOptions(block_size=8), StreamShape(4, 40), encoding=None)
    expected = [[2, 3, 4, 5, 8], [0, 1, 6, 7, 8]]
    for num_layers in (1, 3):
        shape = 2 * num_layers, 3, 5, 9
        weights = oracle_weights([(30, 40), (4, 11)])(memory, torch.zeros(shape)).expand(shape)
        assert weights.topk(5).indices[:, 0, 0].sort().values.tolist() == num_layers * expected


def test_the_page_of_the_memory_has_the_numbers_of_its_json():
    folder = Path(__file__).parents[1] / "docs/results"
    page, parts = (
        (folder / "stream-memory.md").read_text(),
        json.loads((folder / "stream-memory.json").read_text())["parts"],
    )
    recall = {
        row["size"]: [
            f"{row[d] * row['texts'] / 100:.0f} of {row['texts']}" for d in ("200", "1,500", "5,000") if d in row
        ]
        for row in parts["recall"]
    }
    names = {"no memory": "cache 4+508", "8 blocks at random": "random 4+508, 8x64"}
    names |= {"8 blocks of 64 tokens, chosen by the memory": "memory 4+508, 8x64"}
    for row, size in names.items():
        assert f"| {row} | {' | '.join(recall[size])} |" in page
    assert f"and the last ones | {' | '.join(recall['oracle 4+508, 8x64'])} |" in page
    short, long = recall["memory 4+508, 8x64"][1:]
    text = " ".join(page.split())
    assert f"1,000 tokens ago in {short} texts, and one of 4,500 tokens ago in {long};" in text
    (cache, memory), (slow, slower) = parts["perplexity"], parts["speed"]
    assert f"| perplexity of 20,000 tokens | {cache['perplexity']:.2f} | {memory['perplexity']:.2f} |" in page
    assert f"5,000 tokens | {slow['ms per token']:.0f} | {slower['ms per token']:.0f} |" in page
    assert f"1,024 | {slow['prefill tokens/s']:.0f} | {slower['prefill tokens/s']:.0f} |" in page
    assert f"{slow['bytes on device'] / 1e6:.1f} MB | {slower['bytes on device'] / 1e6:.1f} MB |" in page
    assert f"| host memory | | {slower['bytes on host'] / 1e6:.0f} MB |" in page
    lines = {row["size"]: row for row in parts["lines"]}
    names = {
        "no memory": "cache 1+255",
        "8 blocks at random, chosen at each token": "random 1+255, 8x64 interval=1",
        "chosen by the memory every 8 tokens": "memory 1+255, 8x64",
        "every 2 tokens": "memory 1+255, 8x64 interval=2",
        "every 2 tokens, with each key in the index": "memory 1+255, 8x64 interval=2 representative_size=1",
        "at each token": "memory 1+255, 8x64 interval=1",
        "at each token, with each key in the index": "memory 1+255, 8x64 interval=1 representative_size=1",
    }
    for row, size in names.items():
        found = [f"{lines[size][f'{distance} lines']:.0f}" for distance in (5, 20, 60, 120)]
        assert f"| {row} | {' | '.join(found)} |" in page
    found = [f"{lines['oracle 1+255, 8x64'][f'{distance} lines']:.0f}" for distance in (5, 20, 60, 120)]
    assert f"and the last ones | {' | '.join(found)} |" in page
    assert lines.keys() == {*names.values(), "oracle 1+255, 8x64"}
    first, *others = json.loads((folder / "stream-memory-gpu.json").read_text())["parts"]["speed"]
    times = [f"{row['ms per token']:.2f} ({row['ms per token'] / first['ms per token']:.2f} ×)" for row in others]
    assert f"| ms per token | {first['ms per token']:.2f} | {' | '.join(times)} |" in page
    assert f"1,024 | {' | '.join(format(row['prefill tokens/s'], ',.0f') for row in (first, *others))} |" in page
    on_device = [f"{row['bytes on device'] / 1e6:.1f} MB" for row in (first, *others)]
    assert f"| cache on the device | {' | '.join(on_device)} |" in page
    on_host = [f"{row['bytes on host'] / 1e6:.0f} MB" for row in others]
    assert f"| host memory | | {' | '.join(on_host)} |" in page


def test_the_kernels_are_compared_with_exact_gradients(monkeypatch):
    from benchmarks import kernel_peers

    torch.manual_seed(0)
    monkeypatch.setattr(kernel_peers, "ERROR_ROWS", 3)
    monkeypatch.setattr(kernel_peers, "DEVICE", torch.device("cpu"))
    states, weight = torch.randn(8, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    targets = torch.randint(6, (8,))
    expected = torch.autograd.grad(kernel_peers.plain_loss(states, weight, targets), (states, weight))
    torch.testing.assert_close(kernel_peers.exact_gradients(states.detach(), weight.detach(), targets), expected)
    heads, angles = torch.randn(2, 5, 3, 24, requires_grad=True), torch.rand(5, 2).repeat(1, 2)
    grads = torch.randn(3, 2, 5, 3, 8).unbind()
    cos, sin = angles.cos(), angles.sin()
    query, key = kernel_peers.rotary_of_torch(heads, cos, sin)
    grad_heads, sums = kernel_peers.rotary_backward_of_torch(cos, sin, *grads)
    (found,) = torch.autograd.grad((query, key, heads[..., 16:]), heads, grads)
    torch.testing.assert_close(grad_heads, found)
    torch.testing.assert_close(sums, found.sum((0, 1)))
