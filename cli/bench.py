"""`sinklm bench decode`: time and memory of decoding."""

from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..console import Console

if TYPE_CHECKING:
    from transformers import PreTrainedModel

from .evaluate import OUTPUT_HELP, whole_numbers

CONFIGS_PACKAGE = "sinklm.configs"


def decode(
    model: Annotated[
        str,
        typer.Argument(
            help="Training run, checkpoint, transformers folder or name on the Hugging Face Hub; or a packaged recipe "
            "such as pythia-6.9b, whose model is created with random weights.",
            show_default=False,
        ),
    ],
    caches: Annotated[str, typer.Option(help="Cache sizes in tokens, separated by commas.")] = "256,512,1024,2048,4096",
    batch_sizes: Annotated[str, typer.Option(help="Batch sizes (number of streams), separated by commas.")] = "1",
    num_steps: Annotated[int, typer.Option(min=1, help="Number of decoding steps to time.")] = 200,
    output: Annotated[Path | None, typer.Option(help=OUTPUT_HELP, show_default=False)] = None,
) -> None:
    """Measure time and memory of decoding a token for several cache sizes.

    Compares the streaming cache with a cropped cache, with re-computation of the window, and with
    the lower bound set by memory bandwidth.
    """
    from ..eval.decode_speed import copy_bandwidth, measure_decoding, results_table
    from ..eval.plots import plot_decoding
    from ..eval.report import ReportFile, default_output, library_versions

    console = Console()
    cache_sizes, batches = whole_numbers("--caches", caches), whole_numbers("--batch-sizes", batch_sizes)
    if min(cache_sizes + batches) < 1:
        raise ValueError("--caches and --batch-sizes must be numbers of at least 1")
    loaded, description = _load(model)
    bandwidth = copy_bandwidth(loaded.device)
    folder = output or default_output(model)
    file = ReportFile(folder / "decode.json")
    report: dict[str, Any] = {"model": description, "versions": library_versions(), "num_steps": num_steps}
    report |= {"hardware": _hardware(loaded), "copy_bytes_per_second": bandwidth, "results": []}
    for batch_size in batches:
        for cache_size in cache_sizes:
            with console.status(f"cache {cache_size}, batch {batch_size}"):
                rows = measure_decoding(loaded, cache_size, batch_size, num_steps=num_steps, bandwidth=bandwidth)
                report["results"] += rows
            file.keep(report)
    file.finish(report)
    plot_decoding(report, folder / "decode.png", title=f"{model}, {report['hardware']}")
    console.print(results_table(report["results"], f"Decoding, milliseconds per token: {model}, {report['hardware']}"))
    console.print(f"Results: {file.path}, {folder / 'decode.png'}")


def _load(name: str) -> tuple["PreTrainedModel", dict[str, Any]]:
    """Return a model and its description; the model of a recipe has random weights."""
    from ..checkpoints import load_model
    from ..eval.report import describe_model

    if not (files(CONFIGS_PACKAGE) / f"{name}.yaml").is_file() or Path(name).exists():
        loaded = load_model(name)
        return loaded, describe_model(loaded, name)
    loaded = _random_model(name)
    num_parameters = sum(p.numel() for p in loaded.parameters())
    return loaded, {"recipe": name, "num_parameters": num_parameters, "dtype": str(loaded.dtype).removeprefix("torch.")}


def _random_model(recipe: str) -> "PreTrainedModel":
    """Create the model of a recipe with random weights: bfloat16 on a GPU, float32 on a CPU."""
    import torch

    from ..models import SinkGPTNeoXForCausalLM
    from ..train.plan import Plan
    from ..train.recipe import load_config
    from ..train.summary import PYTHIA_TOKENIZER_SIZE

    config = Plan(load_config(recipe), 1, PYTHIA_TOKENIZER_SIZE).model_config
    on_gpu = torch.cuda.is_available()
    with torch.device("cuda" if on_gpu else "cpu"):
        return SinkGPTNeoXForCausalLM._from_config(config, dtype=torch.bfloat16 if on_gpu else torch.float32).eval()


def _hardware(model: "PreTrainedModel") -> str:
    import torch

    if model.device.type == "cuda":
        return torch.cuda.get_device_name(model.device)
    return f"CPU, {torch.get_num_threads()} thread(s)"
