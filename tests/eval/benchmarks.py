"""The paper's seven zero-shot sets with a few rows each, in the forms in which people have them."""

import json
from pathlib import Path

import datasets

ARC = [
    {"id": str(i), "question": question, "choices": {"text": texts, "label": labels}, "answerKey": answer}
    for i, (question, texts, labels, answer) in enumerate(
        [
            ("Which is an animal?", ["a stone", "a horse", "a lamp"], ["A", "B", "C"], "B"),
            ("What is cold?", ["ice", "fire", "steam", "the sun"], ["1", "2", "3", "4"], "1"),
            ("What do plants need?", ["light", "shoes", "paper", "noise"], ["A", "B", "C", "D"], "A"),
        ]
    )
]
HELLASWAG = [
    {
        "ind": i,
        "activity_label": "Cooking [title] soup",
        "ctx_a": "A man cuts an onion.",
        "ctx_b": "he",
        "ctx": "A man cuts an onion. he",
        "endings": ["puts it in a pot. [step] It boils.", "flies away.", "reads it.", "is a  river."],
        "label": label,
    }
    for i, label in enumerate("013")
]
DATA = {  # by data set on the Hub and configuration: split, rows
    ("allenai/ai2_arc", "ARC-Easy"): {"test": ARC, "train": [*reversed(ARC)]},
    ("allenai/ai2_arc", "ARC-Challenge"): {"test": ARC[1:], "train": ARC[:1]},
    ("Rowan/hellaswag", None): {"validation": HELLASWAG},
    ("EleutherAI/lambada_openai", "default"): {
        "test": [{"text": "he took the lamp and lit the lamp"}, {"text": "and the ship left the harbour"}]
    },
    ("allenai/openbookqa", "main"): {
        "test": [{"id": "1", "question_stem": "The sun is", "choices": ARC[2]["choices"], "answerKey": "A"}]
    },
    ("baber/piqa", None): {
        "validation": [{"goal": "open a door", "sol1": "use a key", "sol2": "use a spoon", "label": i} for i in (0, 1)]
    },
    ("allenai/winogrande", "winogrande_xl"): {
        "validation": [
            {"sentence": "Tom saw Ann, and _ waved.", "option1": "Tom", "option2": "Ann", "answer": answer}
            for answer in "12"
        ]
    },
}
TASKS = {
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy"),
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge"),
    "hellaswag": ("Rowan/hellaswag", None),
    "lambada_openai": ("EleutherAI/lambada_openai", "default"),
    "openbookqa": ("allenai/openbookqa", "main"),
    "piqa": ("baber/piqa", None),
    "winogrande": ("allenai/winogrande", "winogrande_xl"),
}


def write_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_card(folder: Path, configs: dict[str, dict[str, str]]) -> None:
    """The README of a data set on the Hub, whose header names the files of each configuration."""
    listed = [
        {"config_name": name, "data_files": [{"split": split, "path": path} for split, path in files.items()]}
        for name, files in configs.items()
    ]
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(listed)}\n---\n# A data set\n", encoding="utf-8")


def write_benchmarks(folder: Path) -> None:
    """All seven sets, in several forms."""
    for (name, config), splits in DATA.items():
        for split, rows in splits.items():
            if name == "allenai/ai2_arc":  # as `git clone` or `hf download --local-dir` leaves it
                write_rows(folder / "ai2_arc" / config / f"{split}-00000-of-00001.parquet", rows)
            elif name == "EleutherAI/lambada_openai":  # with other languages beside it
                write_rows(folder / name / "data" / "lambada_test.jsonl", rows)
                write_rows(folder / name / "data" / "lambada_test_de.jsonl", [{"text": "er nahm die Lampe"}])
            elif name == "allenai/winogrande":  # the Hub's cache
                write_rows(
                    folder
                    / "datasets--allenai--winogrande/snapshots/1a2b"
                    / config
                    / f"{split}-00000-of-00001.parquet",
                    rows,
                )
            else:
                task = next(task for task, source in TASKS.items() if source == (name, config))
                write_rows(folder / f"{task}_{split}.jsonl", rows)
    write_card(
        folder / "ai2_arc",
        {
            config: {split: f"{config}/{split}-*" for split in ("train", "test")}
            for config in ("ARC-Challenge", "ARC-Easy")
        },
    )
