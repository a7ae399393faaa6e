"""What a sink token does, on two small trained models that are shipped, and then the main job in small on any CPU: text
to tokenizer, token store, two models, evaluation, export and a sample.

It runs the same commands as a real job and shows each. The corpus is the source of Python's own standard library, so
nothing is fetched. Everything it makes lies in the folder ``quickstart``.
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
SINKLM = Path(sys.executable).parent / "sinklm"
TRAINED = ROOT / "examples" / "checkpoints"
RUNS = {"vanilla": "none", "learnable-sink": "token"}
PACKAGES = ["", "asyncio", "collections", "concurrent/futures", "email", "html", "http", "importlib", "json", "logging"]
PACKAGES += ["multiprocessing", "sqlite3", "unittest", "urllib", "wsgiref", "xml/dom", "xml/sax", "zoneinfo"]


def main() -> None:
    started = time.perf_counter()
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()

    say(
        "0. What a sink token does: two trained models read a book, with and without the first tokens in a cache of 128"
    )
    for model in RUNS:
        text, output = TRAINED / "book.txt", f"trained/{model}"
        sinklm("eval", "streaming", TRAINED / model, "--text", text, "--tokens", "12000", "--output", output)

    say("1. A corpus in the Pile's form: the source of Python's standard library, every 20th module held out")
    write_corpus()
    sinklm("tokenizer", "train", "corpus.jsonl", "--vocab-size", "2048", "--output", "tokenizer.json")

    say("2. The token store: the corpus tokenized once, in Megatron's format")
    sinklm("prepare", "corpus.jsonl", "--tokenizer", "tokenizer.json", "--output", "store")

    say("3. Two models on the same data in the same order: one plain, one with a learnable sink token (DeepSpeed, CPU)")
    for run, sink in RUNS.items():
        sinklm("train", "quickstart", "data.path=store", f"train.run_dir={run}", f"model.sink.kind={sink}")

    say("4. Perplexity on held-out source code, eight times as long as the 256 positions they were trained on")
    for run in RUNS:
        sinklm("eval", "streaming", run, "--text", "heldout.txt", "--tokens", "2048", "--output", f"{run}/eval")

    say("5. Export: a plain GPTNeoXForCausalLM that needs no code of ours")
    sinklm("export", "learnable-sink", "export")

    say("6. A sample, streamed through a cache of 1 sink token and 63 recent tokens")
    sinklm("generate", "learnable-sink", "def main():", "--max-new-tokens", "100", "--num-kept", "1", "--window", "63")

    summary(time.perf_counter() - started)


def say(text: str) -> None:
    print(f"\n\033[1m{text}\033[0m", flush=True)


def sinklm(*arguments: str | Path) -> None:
    print("$ sinklm", *arguments, flush=True)
    if subprocess.run([SINKLM, *map(str, arguments)], cwd=FOLDER).returncode:
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


def summary(seconds: float) -> None:
    say(f"Done in {seconds / 60:.1f} minutes. Perplexity by tokens kept + window:")
    print("The two trained models, on a book")
    perplexities("trained/{run}/streaming.json")
    print(
        "Four tenths of the attention of the model with a sink token goes to the sink. Without it (0+128) it\n"
        "breaks, with it alone (1+127) nothing is lost. The plain model has only begun to make a sink of its own.\n"
    )
    print("The two made just now, on held-out source code")
    perplexities("{run}/eval/streaming.json")
    print(
        "Two hundred steps are too few for an attention sink to form in either model, so losing the first tokens\n"
        "costs nothing yet. Sinks form after a thousand steps and more, and hundreds of millions of tokens.\n\n"
        f"Pictures   {FOLDER}/trained/*/streaming.png, {FOLDER}/*/eval/streaming.png\n"
        f"Runs       {FOLDER}/vanilla, {FOLDER}/learnable-sink (config.yaml, metrics.jsonl, checkpoints)\n"
        f"Export     {FOLDER}/export (README.md says how to load it)"
    )


def perplexities(path: str) -> None:
    """A row for each run, a column for each cache."""
    reports = {run: json.loads((FOLDER / path.format(run=run)).read_text()) for run in RUNS}
    caches = [result["configuration"] for result in next(iter(reports.values()))["results"]]
    print(f"{'':16}" + "".join(f"{cache:>10}" for cache in caches))
    for run, report in reports.items():
        print(f"{run:16}" + "".join(f"{result['perplexity']:10.2f}" for result in report["results"]))


if __name__ == "__main__":
    main()
