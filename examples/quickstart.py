"""What a sink token does, on two small trained models; then the main job in small, from text to a sample, on any CPU.

It runs the same commands as a real job and shows each. The models lie in ``examples/checkpoints``; the corpus of the
main job is the source of Python's own standard library, so nothing is fetched. Everything it makes lies in the folder
``quickstart``.
"""

import json
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "quickstart"
TRAINED = Path("..", "examples", "checkpoints")  # as seen from FOLDER
SINKLM = Path(sys.executable).parent / "sinklm"
RUNS = {"vanilla": "none", "learnable-sink": "token"}
PACKAGES = ["", "asyncio", "collections", "concurrent/futures", "email", "html", "http", "importlib", "json", "logging"]
PACKAGES += ["multiprocessing", "sqlite3", "unittest", "urllib", "wsgiref", "xml/dom", "xml/sax", "zoneinfo"]


def main() -> None:
    started = time.perf_counter()
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()

    say("1. What a sink token does: two models trained on 578 M tokens read a book through small caches")
    for run in RUNS:
        options = ["--text", TRAINED / "book.txt", "--tokens", "8000", "--caches", "0+128,1+127,4+124"]
        sinklm("eval", "streaming", TRAINED / run, *options, "--output", f"trained/{run}")
    say("Perplexity by tokens kept from the beginning + most recent tokens:")
    compare({run: FOLDER / "trained" / run for run in RUNS})
    print(
        "\nThe model with a sink token breaks when the cache loses it (0+128), and needs nothing but it (1+127). The\n"
        "plain model has begun to use its first token so. Without a limit (dense) both break beyond 256 tokens."
    )

    say("2. A corpus in the Pile's form: the source of Python's standard library, every 20th module held out")
    write_corpus()
    sinklm("tokenizer", "train", "corpus.jsonl", "--vocab-size", "2048", "--output", "tokenizer.json")

    say("3. The token store: the corpus tokenized once, in Megatron's format")
    sinklm("prepare", "corpus.jsonl", "--tokenizer", "tokenizer.json", "--output", "store")

    say("4. Two models on the same data in the same order: one plain, one with a learnable sink token (DeepSpeed, CPU)")
    for run, sink in RUNS.items():
        sinklm("train", "quickstart", "data.path=store", f"train.run_dir={run}", f"model.sink.kind={sink}")

    say("5. Perplexity on held-out source code, eight times as long as the 256 positions they were trained on")
    for run in RUNS:
        sinklm("eval", "streaming", run, "--text", "heldout.txt", "--tokens", "2048", "--output", f"{run}/eval")

    say("6. Export: a plain GPTNeoXForCausalLM that needs no code of ours")
    sinklm("export", "learnable-sink", "export")

    say("7. A sample, streamed through a cache of 1 sink token and 63 recent tokens")
    sinklm("generate", "learnable-sink", "def main():", "--max-new-tokens", "100", "--num-kept", "1", "--window", "63")

    summary(time.perf_counter() - started)


def say(text: str) -> None:
    print(f"\n\033[1m{text}\033[0m", flush=True)


def sinklm(*arguments: str | Path) -> None:
    print("$ sinklm", *arguments, flush=True)
    if subprocess.run([SINKLM, *arguments], cwd=FOLDER).returncode:
        sys.exit(f"\nquickstart stopped: the command above failed. What it had made lies in {FOLDER}")


def write_corpus() -> None:
    library = Path(sysconfig.get_path("stdlib"))
    paths = sorted(path for package in PACKAGES for path in (library / package).glob("*.py"))
    heldout, num_documents = [], 0
    with open(FOLDER / "corpus.jsonl", "w", encoding="utf-8") as corpus:
        for index, path in enumerate(paths):
            text = path.read_text(encoding="utf-8", errors="replace")
            if not text.strip():
                continue
            if index % 20 == 10:
                heldout.append(text)
                continue
            record = {"text": text, "meta": {"pile_set_name": "Python standard library"}}
            corpus.write(json.dumps(record) + "\n")
            num_documents += 1
    (FOLDER / "heldout.txt").write_text("\n".join(heldout), encoding="utf-8")
    size = (FOLDER / "corpus.jsonl").stat().st_size / 1e6
    print(
        f"{num_documents} modules, {size:.1f} MB in {FOLDER / 'corpus.jsonl'}; {len(heldout)} held out in heldout.txt"
    )


def compare(results: dict[str, Path]) -> None:
    """Print the perplexities of each model's evaluation, a line a model and a column a cache."""
    reports = {run: json.loads((folder / "streaming.json").read_text()) for run, folder in results.items()}
    caches = [result["configuration"] for result in next(iter(reports.values()))["results"]]
    print(f"{'':16}" + "".join(f"{cache:>10}" for cache in caches))
    for run, report in reports.items():
        print(f"{run:16}" + "".join(f"{result['perplexity']:10.2f}" for result in report["results"]))


def summary(seconds: float) -> None:
    say(f"Done in {seconds / 60:.1f} minutes. Perplexity of the two new models on held-out source code:")
    compare({run: FOLDER / run / "eval" for run in RUNS})
    print(
        "\nTwo hundred steps are too few for an attention sink to form in either model, so losing the first tokens\n"
        "(0+128) costs nothing yet. Sinks form after a thousand steps and more, and hundreds of millions of tokens:\n"
        "step 1 shows them.\n\n"
        f"Pictures   {FOLDER}/trained/learnable-sink/streaming.png, {FOLDER}/learnable-sink/eval/streaming.png\n"
        f"Runs       {FOLDER}/vanilla, {FOLDER}/learnable-sink (config.yaml, metrics.jsonl, checkpoints)\n"
        f"Export     {FOLDER}/export (README.md says how to load it)"
    )


if __name__ == "__main__":
    main()
