"""`sinklm eval quantization`: what 8 and 4 bits cost each of several models."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..console import Console
from ..hub import near_path_hint
from .options import (
    Device,
    DtypeName,
    Quiet,
    examples,
    note_windows,
    parse_names,
    placement,
    print_results,
    progress_bars,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from ..eval.sinks import Sequences

NOISY_LOGGERS = ("torchao", "torch.utils._pytree")  # GPU libraries that are not there, deprecations
SHORTEST_SAMPLE = 3
FORMATS = ("w8", "w4", "w8a8-token", "w8a8-tensor", "kv8")  # as in `eval.quantization_formats`, of an extra


@examples(
    "sinklm eval quantization runs/quickstart --data book.txt --num-sequences 4",
    "sinklm eval quantization runs/quickstart --data store --formats w8,w8a8-tensor --num-sequences 4",
)
def quantization(
    runs: Annotated[
        list[str],
        typer.Argument(
            help="Models: training runs, checkpoints, exports or names.", show_default=False, metavar="RUN…"
        ),
    ],
    data: Annotated[
        Path,
        typer.Option(help="UTF-8 text file, or token store whose held-out split is read.", show_default=False),
    ],
    formats: Annotated[
        str,
        typer.Option(
            help="Formats, separated by commas: w8, w4 (weights), w8a8-token, w8a8-tensor (weights and activations), "
            "kv8 (keys and values)."
        ),
    ] = ",".join(FORMATS),
    num_sequences: Annotated[int, typer.Option(min=2, help="Number of samples, spread evenly over the text.")] = 100,
    seq_length: Annotated[
        int | None,
        typer.Option(
            min=SHORTEST_SAMPLE,
            help="Tokens of text in a sample, the same for all models.",
            show_default="the most that fits all trained lengths, at most 2048",
        ),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the tables and the picture.")] = Path(
        "results/quantization"
    ),
    device: Device = None,
    dtype: Annotated[
        DtypeName, typer.Option(help="Data type of all that is not quantized. auto: as saved.")
    ] = DtypeName.FLOAT32,
    quiet: Quiet = False,
) -> None:
    """Measure how much quantization raises the loss of models, and how large activations are.

    Writes quantization.json, quantization.md, quantization.csv and quantization.png.
    """
    is_default = formats == ",".join(FORMATS)
    wanted = parse_names(formats, "--formats", FORMATS)
    if not data.exists() or not os.access(data, os.R_OK):
        raise FileNotFoundError(
            f"--data {data} cannot be read: {near_path_hint(str(data)) or 'pass a text file or a token store'}"
        )
    console = Console(is_quiet=quiet)
    console.note(f"loading {', '.join(runs)} …")
    for name in NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    from ..eval.quantization_output import csv_text, markdown, plot_quantization, results_table
    from ..eval.report import ReportFile, library_versions
    from ..eval.saved_reports import short_names
    from ..files import write_text

    place = placement(device, dtype)
    file = ReportFile(output / "quantization.json")
    _check_store(runs, data, num_sequences, seq_length)
    num_tokens, wanted, notes = _check_runs(runs, wanted, place, seq_length, is_default=is_default)
    report: dict[str, Any] = {"formats": wanted, "runs": [], "notes": notes}
    report |= {"num_samples": num_sequences, "num_tokens": num_tokens, "data": str(data)}
    report["versions"] = library_versions("torchao")
    for run, name in zip(runs, short_names(runs), strict=True):
        report["runs"].append(_measure_run(console, run, name, data, wanted, num_sequences, num_tokens, place))
        file.keep(report)
    if len({run["samples"]["ids_sha256"] for run in report["runs"]}) > 1:
        report["notes"].append("The tokenizers of the runs differ, so their losses are those of different samples.")
    file.finish(report)
    write_text(output / "quantization.csv", csv_text(report))
    write_text(output / "quantization.md", markdown(report))
    plot_quantization(report, output / "quantization.png")
    console.print(
        results_table(report, f"Loss over that of the unquantized model, {num_sequences} samples", console.width)
    )
    console.print("nats per token ± one standard error, paired over samples")
    for note in report["notes"]:
        console.warn(note)
    print_results(console, [output / f"quantization.{suffix}" for suffix in ("json", "md", "csv", "png")])


def _load(run: str, place: dict[str, Any]) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    from ..checkpoints import load_tokenizer
    from ..eval.loading import load_causal_model

    return load_causal_model(run, **place), load_tokenizer(run)


def _check_store(runs: list[str], data: Path, num_samples: int, seq_length: int | None) -> None:
    """Refuse a folder that is no store of these tokenizers, or too short, before loading models."""
    from ..checkpoints import load_tokenizer
    from ..eval.quantization_losses import read_samples

    if data.is_dir():
        for run in runs:
            read_samples(data, load_tokenizer(run), num_samples, seq_length or SHORTEST_SAMPLE)


@dataclass(frozen=True)
class _Facts:
    """What the checks need to know of a run. They load its model once.

    Attributes:
        num_tokens: tokens of text that a sample of this run has.
        num_others: sinks and prefix of the tokenizer before the text.
        config: of the model's decoder.
    """

    run: str
    num_tokens: int
    num_others: int
    config: "PreTrainedConfig"


def _check_runs(
    runs: list[str], wanted: list[str], place: dict[str, Any], seq_length: int | None, *, is_default: bool
) -> tuple[int, list[str], list[str]]:
    """Refuse what cannot be measured before measuring.

    Args:
        is_default: whether ``wanted`` is the default. If so, a format of the cache that would
            quantize nothing is left out; otherwise it is an error.

    Returns:
        The tokens of text in a sample, the formats to measure, and why the others were left out.
    """
    from ..eval.quantization_formats import FORMATS as KNOWN

    facts = [_facts_of(run, wanted, place, seq_length) for run in runs]
    num_tokens = min(each.num_tokens for each in facts)
    cached = [name for name in wanted if KNOWN[name].kv_dtype]
    problem = _why_no_kv(facts, num_tokens) if cached else None
    if problem is None:
        return num_tokens, wanted, []
    if not is_default:
        raise ValueError(problem)
    return num_tokens, [name for name in wanted if name not in cached], [f"{', '.join(cached)} was left out. {problem}"]


def _facts_of(run: str, wanted: list[str], place: dict[str, Any], seq_length: int | None) -> _Facts:
    """Load a run and check that its weights fit the formats, and that the samples fit it."""
    from ..eval.perplexity import text_prefix
    from ..eval.quantization import check_format
    from ..eval.quantization_losses import num_text_tokens
    from ..models.config import num_prepended_sinks
    from ..streaming.wrappers import decoder_of

    model, tokenizer = _load(run, place)
    num_prefix = len(text_prefix(tokenizer))
    try:
        for name in wanted:
            check_format(model, name)
        num_tokens = num_text_tokens(model, num_prefix, seq_length)
    except ValueError as error:
        raise ValueError(f"{run}: {error}") from error
    return _Facts(run, num_tokens, num_prefix + num_prepended_sinks(model.config), decoder_of(model).config)


def _why_no_kv(facts: list[_Facts], num_tokens: int) -> str | None:
    """Return why the cache of a run would quantize nothing, or None if there is no such run.

    Each run is checked with the length of its own samples first. So the run that is too short is
    named, and not one for which only ``num_tokens``, the shortest length of all runs, is too short.
    """
    from ..eval.quantization_losses import check_kv

    own, shortest = [(each, each.num_tokens) for each in facts], [(each, num_tokens) for each in facts]
    for each, length in [*own, *shortest]:
        try:
            check_kv(each.config, length + each.num_others)
        except ValueError as error:
            return f"{each.run}: {error}"
    return None


def _measure_run(
    console: Console,
    run: str,
    name: str,
    data: Path,
    wanted: list[str],
    num_samples: int,
    num_tokens: int,
    place: dict[str, Any],
) -> dict[str, Any]:
    from ..eval.quantization_losses import (
        activations,
        as_json,
        ids_sha256,
        measure_increase,
        read_samples,
        sample_losses,
    )
    from ..eval.report import describe_model

    model, tokenizer = _load(run, place)
    note_windows(console, model, run, has_cache=False)
    samples: Sequences = read_samples(data, tokenizer, num_samples, num_tokens)
    with progress_bars(console) as bars:
        bar = bars.add_task(name[-16:], total=num_samples * (1 + len(wanted)))

        def advance(num: int) -> None:
            bars.advance(bar, num)

        losses = sample_losses(model, samples, advance)
        increases = [measure_increase(model, samples, each, losses, advance) for each in wanted]
    return {
        "name": name,
        "model": describe_model(model, run),
        "samples": samples.source | {"ids_sha256": ids_sha256(samples)},
        **as_json(losses, increases, activations(model, samples)),
    }
