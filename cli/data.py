"""``sinklm data``: join token stores, and look into one."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import examples, refuse_unused

if TYPE_CHECKING:
    from ..console import Console
    from ..data.store import TokenSource

PREVIEW_LENGTH = 60  # characters


@examples(
    "sinklm data merge parts/00 parts/01 -o stores/all",
    "sinklm data merge parts/01 parts/00 -o stores/other-order",
)
def merge(
    stores: Annotated[list[Path], typer.Argument(metavar="STORE", help="Finished token stores, in order.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to create.")],
) -> None:
    """Join token stores into one without copying tokens.

    Prepare one input file per job, on any number of machines, then join the stores. The new store
    has hard links to the files of these stores, so all must be on one file system. You can delete
    the old stores afterwards.
    """
    from ..console import Console
    from ..data.merge import merge_stores
    from .store_summary import print_summary

    console = Console()
    manifest = merge_stores(stores, output)
    print_summary(console, manifest, output)
    console.print(f"fingerprint {manifest.fingerprint}", highlight=False, soft_wrap=True)
    console.print(
        "The merged stores remain and can be deleted. After that, the next opening reads all files once, because a "
        "deleted link changes the change time of the file."
    )


@examples(
    "sinklm data inspect store --document 0",
    "sinklm data inspect store --recipe quickstart --step 1",
)
def inspect(
    store: Annotated[
        Path,
        typer.Argument(help="Token store, folder of pre-shuffled rows, or folder with a sample order of Megatron."),
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Keys of the recipe, as for `sinklm train`.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split that --document is in: train or validation.")] = "train",
    document: Annotated[int | None, typer.Option(min=0, help="Print this document.")] = None,
    recipe: Annotated[
        str | None, typer.Option(help="Recipe that defines samples and steps, or the folder of a run.")
    ] = None,
    sample: Annotated[int | None, typer.Option(min=0, help="Print this training sample of the recipe.")] = None,
    step: Annotated[
        int | None, typer.Option(min=1, help="List the samples of this step; steps count from 1, as in metrics.jsonl.")
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read all files and compare their checksums.")] = False,
) -> None:
    """Show what is in a token store: counts by set, a document, a sample, or a step's samples."""
    from ..console import Console
    from ..data import TokenStore, open_store
    from ..data.tokenizer import load_tokenizer_file

    if recipe is None and (sample is not None or step is not None or overrides):
        raise ValueError("samples and steps depend on the recipe: pass --recipe with its name or path")
    refuse_unused(
        {"--split": split != "train" and document is None},
        "without --document, because samples are of the training split: add it, or leave out --split",
    )
    console = Console(highlight=False, soft_wrap=True)
    opened = open_store(store, verify="sha256" if verify else "size")
    tokenizer = load_tokenizer_file(opened.tokenizer_path)

    def text(ids: Iterable[int]) -> str:
        return tokenizer.decode(list(ids), skip_special_tokens=False)

    if document is not None:
        ids = opened.document(split, document)
        console.print(f"document {document} of the {split} split, {len(ids):,} tokens:")
        console.write(text(ids))
    if recipe is not None:
        _show_samples(console, opened, recipe, list(overrides or ()), sample, step, text)
    if document is None and recipe is None:
        _show_summary(console, opened)
    if not verify and document is None and recipe is None:
        console.print("only the sizes of the files were checked; --verify also compares their checksums")
    if verify:
        is_checked = isinstance(opened, TokenStore)
        console.print(
            "all checksums are right" if is_checked else f"{store}: has no checksums, so nothing was verified"
        )


def _show_summary(console: "Console", store: "TokenSource") -> None:
    from ..console import Console
    from ..data import TokenStore
    from .store_summary import print_summary

    if isinstance(store, TokenStore):
        print_summary(Console(), store.manifest, store.path)
        console.print(f"sources: {len(store.manifest.sources):,}")
    else:
        console.print(f"{store.path}: {len(store.split('train')):,} tokens in rows, in their own order")
    console.print(f"tokenizer: {store.tokenizer_size:,} ids, documents end with id {store.eod_id}")
    console.print(f"fingerprint {store.fingerprint}")


def _show_samples(
    console: "Console",
    store: "TokenSource",
    recipe: str,
    overrides: list[str],
    sample: int | None,
    step: int | None,
    text,
) -> None:
    from ..data import SetWindows, batch_indices
    from ..train.batches import open_windows, sample_order, samples_of_step
    from ..train.config import ValidationSection
    from ..train.plan import Plan
    from ..train.recipe import load_config

    config = load_config(recipe, overrides)
    config = config.model_copy(update={"validation": ValidationSection(every_steps=None)})  # its split is not needed
    plan = Plan(config, 1, store.tokenizer_size, store.eod_id)
    windows, _ = open_windows(store, plan)
    if sample is not None:
        if sample >= len(windows):
            raise ValueError(f"--sample {sample}: there are {len(windows):,} samples, numbered from 0")
        console.print(f"sample {sample} of {len(windows):,}, {plan.tokens_per_sample:,} tokens:")
        console.write(text(windows[sample]))
    if step is not None:
        if step > config.train.num_steps:
            raise ValueError(
                f"--step {step}: training ends at step {config.train.num_steps:,}; add train.num_steps={step} to see "
                "the samples of a longer run"
            )
        positions = batch_indices(step - 1, plan.samples_per_step)
        console.print(f"step {step}: positions {positions[0]:,} to {positions[-1]:,} of the data order")
        console.print("position  sample  text")
        numbers = samples_of_step(sample_order(store, windows, plan), step - 1, plan.samples_per_step)
        for position, number in zip(positions, numbers, strict=True):
            name = f"[{windows.place_of(number)[0]}] " if isinstance(windows, SetWindows) else ""
            preview = text(windows[number][: 2 * PREVIEW_LENGTH])[:PREVIEW_LENGTH]
            console.print(f"{position}  {number}  {name}{preview!r}")
    if sample is None and step is None:
        console.print(
            f"{len(windows):,} samples of {plan.tokens_per_sample:,} tokens, {plan.samples_per_step:,} per step"
        )
