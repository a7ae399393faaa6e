"""Measure the perplexity of each checkpoint of a run with 0, 1, 2 and 4 kept tokens.

python study/forming.py runs/study/runs/vanilla --text book.txt --output runs/study/results/vanilla
"""

import argparse
import sys
from pathlib import Path

from sinklm.checkpoints import load_model, load_tokenizer
from sinklm.checkpoints.folders import list_checkpoints, read_state
from sinklm.eval.perplexity import configurations, default_caches, measure, read_text_files
from sinklm.eval.report import ReportFile, describe_model, library_versions
from sinklm.models.config import num_prepended_sinks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--text", type=Path, action="append", required=True)
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()

    if not (checkpoints := list_checkpoints(arguments.run)):
        raise ValueError(f"{arguments.run} contains no complete checkpoint: pass the folder of a training run")
    tokenized = read_text_files(arguments.text, load_tokenizer(arguments.run), arguments.tokens)
    report: dict = {"versions": library_versions(), "num_tokens": arguments.tokens, "text_sha256": tokenized.sha256}
    report["checkpoints"] = []
    file = ReportFile(arguments.output / "forming.json")
    for step, checkpoint in checkpoints.items():
        model = load_model(checkpoint)
        report["model"] = describe_model(model, arguments.run)
        chosen = configurations(("window", "streaming"), default_caches(model), num_prepended_sinks(model.config))
        perplexities = {str(c): measure(model, tokenized, c).perplexity for c in chosen}
        tokens = read_state(checkpoint).positions
        report["checkpoints"].append({"step": step, "tokens": tokens, "perplexity": perplexities})
        file.keep(report)
        print(step, *(f"{cache}: {perplexity:.2f}" for cache, perplexity in perplexities.items()), flush=True)
    file.finish(report)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
