"""`sinklm export`: write a checkpoint for transformers, llama.cpp or the Hugging Face Hub."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..console import Console
from ..files import read_text
from .options import DtypeName, Quiet, examples, refuse_unused

if TYPE_CHECKING:
    from ..checkpoints.hub import Publication


class Form(StrEnum):
    """Values of ``--to``."""

    HF = "hf"
    GGUF = "gguf"
    HUB = "hub"


@examples(
    "sinklm export runs/quickstart exports/quickstart",
    "sinklm export runs/quickstart/checkpoints/step-20 exports/step-20",
    "sinklm export runs/quickstart exports/small --dtype bfloat16",
    "sinklm export runs/quickstart exports/quickstart.gguf --to gguf",
    "sinklm export runs/quickstart me/quickstart --to hub --private --dry-run",
)
def export(
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="Training run (its newest checkpoint is used) or checkpoint; for gguf and hub also an export.",
            show_default=False,
        ),
    ],
    output: Annotated[
        str,
        typer.Argument(
            help="hf: folder to create. gguf: file.gguf, or a folder for model.gguf. hub: owner/name.",
            show_default=False,
        ),
    ],
    to: Annotated[
        Form,
        typer.Option(
            help="hf: a folder that transformers loads without sinklm. gguf: a file for llama.cpp. hub: upload the "
            "folder to the Hugging Face Hub."
        ),
    ] = Form.HF,
    dtype: Annotated[
        DtypeName,
        typer.Option(help="Data type of the weights (in a GGUF file: of the matrices). auto: as in the checkpoint."),
    ] = DtypeName.AUTO,
    private: Annotated[bool, typer.Option("--private", help="Create a private repository on the Hub.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be uploaded to the Hub, without contacting it.")
    ] = False,
    full_attention: Annotated[
        bool,
        typer.Option(
            "--full-attention",
            help="Replace windowed layers by full attention, and measure how much the loss changes.",
        ),
    ] = False,
    text: Annotated[
        Path | None,
        typer.Option(help="Text for --full-attention.", show_default="help texts of Python"),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Export a checkpoint for transformers, for llama.cpp, or to the Hugging Face Hub."""
    if to == Form.HF and output.lower().endswith(".gguf"):
        raise ValueError(f"{output} would be a folder for transformers: did you mean --to gguf?")
    refuse_unused(
        {"--private": to != Form.HUB and private, "--dry-run": to != Form.HUB and dry_run},
        "without --to hub: add --to hub, or leave it out",
    )
    refuse_unused(
        {"--text": text is not None and not full_attention}, "without --full-attention: add it, or remove --text"
    )
    console = Console(is_quiet=quiet)
    options: dict[str, Any] = {"dtype": str(dtype), "full_attention": full_attention}
    options["text"] = None if text is None else _read(text)
    console.print(_export(console, checkpoint, output, to, private, dry_run, options), soft_wrap=True)


def _export(
    console: Console,
    checkpoint: str,
    output: str,
    to: Form,
    private: bool,
    dry_run: bool,
    options: dict[str, Any],
) -> str:
    """Write the export, with ``options`` as further arguments. Returns what to tell the user."""
    measuring = " and measuring the loss with and without windows" * options["full_attention"]
    console.note(f"loading {checkpoint}{measuring} …")
    if to == Form.GGUF:
        from ..checkpoints.gguf_export import export_gguf

        file = export_gguf(checkpoint, output, **options)
        return f"{file} is a GGUF file for llama.cpp."
    if to == Form.HF:
        from ..checkpoints.export import export_model

        folder = export_model(checkpoint, Path(output), **options)
        return f"{folder} is a plain GPTNeoXForCausalLM. Its README.md shows how to load it with transformers."
    from ..checkpoints.hub import describe_publication, publish

    if dry_run:
        return _describe(describe_publication(checkpoint, output, **options), private)
    return f"Uploaded: {publish(checkpoint, output, private=private, **options)}"


def _read(path: Path) -> str:
    """Read the text of ``--text`` as `sinklm prepare` and the evaluations do."""
    if path.exists() and not path.is_file():
        raise ValueError(f"--text {path} is not a file: pass a text file")
    return read_text(path, "pass a text file", option="--text")


def _describe(publication: "Publication", private: bool) -> str:
    sizes = publication.files
    width = max(map(len, sizes))
    visibility = "private" if private else "public, unless your account's setting is private; see --private"
    return "\n".join(
        [
            f"Would upload to {publication.repository} (a new repository would be {visibility}):",
            "",
            *(f"  {name:<{width}} {size:>15,} bytes" for name, size in sizes.items()),
            f"  {'total':<{width}} {sum(sizes.values()):>15,} bytes",
            "",
            "The model card, README.md:",
            "",
            publication.card,
        ]
    )
