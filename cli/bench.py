"""`sinklm bench decode`: time and memory of decoding."""

from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..console import Console

if TYPE_CHECKING:
    from transformers import PreTrainedModel

from .options import (
    CACHES_HELP,
    CACHES_METAVAR,
    WINDOW_OF_EXPORT,
    Device,
    Dtype,
    DtypeName,
    Output,
    Quiet,
    Seed,
    examples,
    note_windows,
    parse_caches,
    parse_numbers,
    placement,
    print_results,
)

CONFIGS_PACKAGE = "sinklm.configs"


@examples(
    "sinklm bench decode runs/quickstart --caches 1+63,1+127 --num-steps 20",
    "sinklm bench decode pythia-6.9b --batch-sizes 1,8 --device cuda",
)
def decode(
    model: Annotated[
        str,
        typer.Argument(
            help="Training run, checkpoint, transformers folder or name on the Hugging Face Hub; or a packaged recipe "
            "such as pythia-6.9b, whose model is created with random weights.",
            show_default=False,
        ),
    ],
    caches: Annotated[
        str | None,
        typer.Option(
            metavar=CACHES_METAVAR,
            help=CACHES_HELP,
            show_default="the model's sinks, or 4 tokens, in caches of 256, 512, 1024, 2048 and 4096 tokens"
            f"{WINDOW_OF_EXPORT}",
        ),
    ] = None,
    batch_sizes: Annotated[str, typer.Option(help="Batch sizes (number of streams), separated by commas.")] = "1",
    num_steps: Annotated[int, typer.Option(min=1, help="Number of decoding steps to time.")] = 200,
    seed: Seed = 0,
    output: Output = None,
    device: Device = None,
    dtype: Dtype = DtypeName.AUTO,
    quiet: Quiet = False,
) -> None:
    """Measure time and memory of decoding a token for several cache sizes.

    Compares the streaming cache with a cropped cache, with re-computation of the window, and with
    the lower bound set by memory bandwidth.
    """
    given = None if caches is None else parse_caches(caches)
    batches = parse_numbers(batch_sizes, "--batch-sizes")
    if min(batches) < 1:
        raise ValueError(f"--batch-sizes is {batch_sizes}: batch sizes must be at least 1")
    console = Console(is_quiet=quiet)
    console.note(f"loading {model} …")
    import torch

    from ..eval.decode_speed import copy_bandwidth, default_caches, measure_decoding, results_table
    from ..eval.plots import plot_decoding
    from ..eval.report import ReportFile, default_output, display_name, library_versions

    torch.manual_seed(seed)
    loaded, description = _load(model, **placement(device, dtype))
    bandwidth = copy_bandwidth(loaded.device)
    folder = output or default_output(model)
    file = ReportFile(folder / "decode.json")
    report: dict[str, Any] = {
        "model": description,
        "versions": library_versions(),
        "num_steps": num_steps,
        "seed": seed,
    }
    note_windows(console, loaded, model)
    report |= {"hardware": _hardware(loaded), "copy_bytes_per_second": bandwidth, "results": []}
    for batch_size in batches:
        for shape in given or default_caches(loaded):
            with console.stderr_console.status(f"cache {shape[0]}+{shape[1]}, batch {batch_size}"):
                rows = measure_decoding(loaded, *shape, batch_size, num_steps=num_steps, bandwidth=bandwidth)
                report["results"] += rows
            file.keep(report)
    file.finish(report)
    title = f"{display_name(model)}, {report['hardware']}"
    plot_decoding(report, folder / "decode.png", title=title)
    console.print(results_table(report["results"], f"Decoding, milliseconds per token: {title}"))
    print_results(console, [file.path, folder / "decode.png"])


def _load(name: str, **options: Any) -> tuple["PreTrainedModel", dict[str, Any]]:
    """Return a model and its description; the model of a recipe has random weights.

    Args:
        options: device and dtype as in `load_model`.
    """
    from ..checkpoints import load_model
    from ..checkpoints.weight_types import name_of
    from ..eval.report import describe_model
    from ..streaming.layers import describe_rules

    if not (files(CONFIGS_PACKAGE) / f"{name}.yaml").is_file() or Path(name).exists():
        loaded = load_model(name, **options)
        return loaded, describe_model(loaded, name)
    loaded = _random_model(name, **options)
    num_parameters = sum(p.numel() for p in loaded.parameters())
    return loaded, {
        "recipe": name,
        "num_parameters": num_parameters,
        "windows": describe_rules(loaded.config),
        "dtype": name_of(loaded.dtype),
    }


def _random_model(recipe: str, device: str | None = None, dtype: str | None = None) -> "PreTrainedModel":
    """Create the model of a recipe with random weights.

    The default dtype is bfloat16 on a GPU and float32 on a CPU.
    """
    import torch

    from ..models import SinkGPTNeoXForCausalLM
    from ..train.plan import Plan
    from ..train.recipe import load_config
    from ..train.summary import PYTHIA_TOKENIZER_SIZE

    config = Plan(load_config(recipe), 1, PYTHIA_TOKENIZER_SIZE).model_config
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    default = "float32" if place.type == "cpu" else "bfloat16"
    with place:
        return SinkGPTNeoXForCausalLM._from_config(config, dtype=getattr(torch, dtype or default)).eval()


def _hardware(model: "PreTrainedModel") -> str:
    import torch

    if model.device.type == "cuda":
        return torch.cuda.get_device_name(model.device)
    return f"CPU, {torch.get_num_threads()} thread(s)"
