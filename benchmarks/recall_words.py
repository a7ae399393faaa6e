"""Which words of StreamEval keep a model from finding its lines.

    python benchmarks/recall_words.py NAME=RUN … -o FOLDER/recall-words.json

FOLDER is that of recall_study.py, so that recall_report.py makes a table of the results.

Asks each model for lines of StreamEval's records, and of the same records in other words. Records
are short, so there is no streaming cache. Prints the share of right answers in percent.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sinklm.checkpoints import load_model, load_tokenizer
from sinklm.eval.report import library_versions
from sinklm.eval.tasks.stream_eval.records import PREAMBLE, make_records, question_text, record_text
from sinklm.files import write_json

DISTANCES = (0, 5, 10, 20, 29)  # in lines
REPLACEMENTS = {  # text by what replaces it
    "StreamEval": {},
    "slot for line": {"in line ": "in slot "},
    "BOX for REGISTER": {"REGISTER": "BOX"},
    "Recall for Query": {"Query": "Recall"},
    "no preamble": {PREAMBLE: ""},
}


@torch.no_grad()
def is_answered(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, answer: str) -> bool:
    """Whether greedy decoding continues a text by an answer."""
    num_tokens = len(tokenizer(text)["input_ids"])
    ids = torch.tensor([tokenizer(text + answer)["input_ids"]], device=model.device)
    predicted = model(ids).logits[0].argmax(-1)
    return bool((predicted[num_tokens - 1 : -1] == ids[0, num_tokens:]).all())


def accuracies(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, replaced: dict[str, str], args: argparse.Namespace
) -> dict[str, float]:
    """Return the share of right answers by distance, in percent."""
    rights: dict[int, list[bool]] = {distance: [] for distance in DISTANCES}
    for record in make_records(args.num_records, args.num_lines, seed=0):
        for distance, found in rights.items():
            line = args.num_lines - 1 - distance
            text = record_text(record, args.num_lines) + question_text(line)
            for old, new in replaced.items():
                text = text.replace(old, new)
            found.append(is_answered(model, tokenizer, text, f" <{record[line]}>"))
    return {str(distance): 100 * sum(found) / len(found) for distance, found in rights.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="NAME=RUN", help="a run, checkpoint or export, and its name")
    parser.add_argument("--num-records", type=int, default=20)
    parser.add_argument("--num-lines", type=int, default=31)
    parser.add_argument("-o", "--output", type=Path, default=Path("recall-words.json"))
    args = parser.parse_args()
    names = [given.partition("=")[0] for given in args.models if "=" in given]
    if len(set(names)) < len(args.models):
        parser.error("write NAME=RUN for each model, with different names")
    found: dict[str, Any] = {"num_records": args.num_records, "num_lines": args.num_lines, "models": {}}
    found |= {"distances": [str(distance) for distance in DISTANCES], "versions": library_versions()}
    for model_name, _, path in (given.partition("=") for given in args.models):
        model, tokenizer = load_model(path), load_tokenizer(path)
        rows = found["models"][model_name] = {}
        for name, replaced in REPLACEMENTS.items():
            rows[name] = accuracies(model, tokenizer, replaced, args)
            print(model_name, name, rows[name], flush=True)
        write_json(args.output, found)


if __name__ == "__main__":
    main()
