"""Import a GPT-NeoX model, such as Pythia, as a model with a sink to evaluate and to train on.

A sink token is the first id that the tokenizer does not use. Pythia's tokenizer has the ids 0 to
50276 and its embedding 50304 rows or more, which pads the matrix for speed, so the sink has the id
50277 and no shape changes.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import GPTNeoXConfig, PreTrainedConfig

from ..files import check_new, named_errors
from ..models import SinkGPTNeoXConfig, SinkGPTNeoXForCausalLM
from ..models.config import sink_config
from .checks import checked_config, read_json_object, read_tokenizer
from .checksums import verify_model_folder, write_sums
from .loading import save_model
from .model_tokenizer import write_tokenizer
from .sink_rows import SinkRow, start_sink_rows
from .sources import find_model, with_safetensors
from .warm_start import load_same_weights

# A gate halves the output of every attention layer at the start, for which no weight is trained.
SINKS = ("token", "none", "zero", "logit", "kv_bias")
VOCABULARY_MULTIPLE = 128

CARD = """\
# {name}

{source}{commit}, imported by sinklm with `sink.kind` {kind}.
{sink}

The weights are those of the source{but}, and so is their licence.{rows} `sinklm eval` evaluates this
folder, and `sinklm train RECIPE model.init_from=FOLDER` trains on from it.
"""

ROWS = {
    SinkRow.MEAN: "the mean of those of all tokens",
    SinkRow.ENDOFTEXT: "that of the end-of-text token",
    SinkRow.RANDOM: "random",
}


@dataclass(frozen=True)
class Imported:
    """What `import_model` has written.

    Attributes:
        folder: the new model.
        commit: of the source on the Hub; None if it is a folder.
        config: the configuration of the new model.
        num_parameters: of the new model.
        num_new_rows: by which the embedding has grown, if it had no room for a sink.
    """

    folder: Path
    commit: str | None
    config: SinkGPTNeoXConfig
    num_parameters: int
    num_new_rows: int


def import_model(
    source: str | Path,
    output: str | Path,
    *,
    revision: str | None = None,
    sink: str = "token",
    sink_row: str | None = None,
    seed: int = 0,
    dtype: torch.dtype | str = "auto",
) -> Imported:
    """Write a GPT-NeoX model as a model of sinklm, which every command accepts.

    All weights keep their values, except the row of the embedding for a sink token. The head and
    the padding rows are unchanged too. If the embedding has no unused row, it grows to a multiple
    of 128; the new rows of embedding and head are the mean of the others.

    Args:
        source: a name on the Hub, or a transformers folder with ``config.json``, ``tokenizer.json``
            and weights as safetensors or pickles, in one file or several.
        output: the folder to create. It may exist if it is empty.
        revision: branch, tag or commit on the Hub, such as ``step3000``.
        sink: ``token``; ``none``, which computes exactly what transformers does; ``zero``,
            ``logit`` or ``kv_bias``, whose additional column changes the output at once.
        sink_row: initial row of the sink token, see `SinkRow`; None: ``mean``.
        seed: of a random row.
        dtype: of the new weights; ``"auto"``: that of the source.

    Raises:
        ValueError: the source is not a plain GPT-NeoX, its files are damaged or do not fit
            together, or an argument is wrong.
        FileExistsError: ``output`` exists and is not empty.
        OSError: a file is missing, or cannot be downloaded or written. No partial files remain.
    """
    output = Path(output)
    _check_arguments(sink, sink_row)
    row = SinkRow(sink_row or SinkRow.MEAN)
    target = check_new(output, "folder")
    folder = find_model(source, revision)
    with _new_folder(output, target) as partial:
        scratch = partial / "scratch"
        scratch.mkdir()
        with _named_source(scratch, folder):
            model, num_new_rows = _model(source, with_safetensors(folder, scratch), folder, sink, dtype)
        if sink == "token":
            start_sink_rows(model, model.config.sink_token_ids, row, seed=seed)
        save_model(model, partial)
        shutil.rmtree(scratch)
        write_tokenizer(partial, model.config, folder / "tokenizer.json")
        commit = folder.name if not Path(source).is_dir() else None
        imported = Imported(output, commit, model.config, model.num_parameters(), num_new_rows)
        (partial / "README.md").write_text(_card(source, revision, imported, row), encoding="utf-8")
        write_sums(partial)
    return imported


@contextmanager
def _new_folder(output: Path, target: Path) -> Iterator[Path]:
    """Yield an empty folder that is renamed to ``target`` at the end, and deleted after an error.

    Args:
        output: how the user names ``target``.
    """
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        with named_errors(output):
            os.rename(partial, target)
    except SafetensorError as error:
        raise OSError(f"cannot write to {output.absolute().parent}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_arguments(sink: str, sink_row: str | None) -> None:
    if sink not in SINKS:
        why = ": its gate starts at one half, so the model would lose what it has learned" if sink == "gate" else ""
        raise ValueError(f"--sink {sink} is not possible{why}: choose one of {', '.join(SINKS)}")
    if sink_row is not None and sink != "token":
        raise ValueError(f"--sink-row {sink_row} is for a sink token, but --sink is {sink}: leave it out")
    if sink_row not in (None, *SinkRow):
        raise ValueError(f"--sink-row is {sink_row!r}: choose one of {', '.join(SinkRow)}")


@contextmanager
def _named_source(scratch: Path, folder: Path) -> Iterator[None]:
    """Name the source in errors about the safetensors that were made of its pickles."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).replace(str(scratch), str(folder))) from error


def _model(
    source: str | Path, folder: Path, original: Path, sink: str, dtype: torch.dtype | str
) -> tuple[SinkGPTNeoXForCausalLM, int]:
    """Load the weights. Returns the model and the number of rows that its embedding has grown by.

    Args:
        folder: has the configuration and safetensors.
        original: has the tokenizer.
    """
    verify_model_folder(str(original))
    theirs = checked_config(str(folder))
    _check_source(source, theirs)
    num_tokens = _num_tokens(original)
    if not isinstance(theirs.eos_token_id, int) or not 0 <= theirs.eos_token_id < num_tokens:
        raise ValueError(
            f"{source}: eos_token_id in its config.json is {theirs.eos_token_id}: set it to the id of the end-of-text "
            "token, which ends every document"
        )
    if num_tokens > theirs.vocab_size:
        raise ValueError(
            f"{source} has {theirs.vocab_size} rows in its embedding, but its tokenizer has {num_tokens} ids: use "
            "the tokenizer of the model"
        )
    # A sink token is set afterwards: the embedding may have no row for it yet.
    config = _config(theirs, "none" if sink == "token" else sink)
    model = load_same_weights(str(folder), config, dtype)
    num_new_rows = 0
    if sink == "token":
        if num_tokens == theirs.vocab_size:
            num_new_rows = _grow(model)
        model.config.sink = {"kind": "token", "num_tokens": 1, "first_token_id": num_tokens}
        model.config.validate_sink()
    return model, num_new_rows


def _check_source(source: str | Path, config: PreTrainedConfig) -> None:
    if config.model_type == "sink_gpt_neox" or sink_config(config).sink_kind != "none":
        raise ValueError(
            f"{source} is a model of sinklm with sink.kind {sink_config(config).sink_kind}: it needs no import; train "
            f"on from it with model.init_from={source}"
        )
    if not isinstance(config, GPTNeoXConfig):
        raise ValueError(f"{source} has model type {config.model_type}: use a GPT-NeoX model, such as Pythia")
    if config.tie_word_embeddings:
        raise ValueError(f"{source} shares one matrix between embedding and head, which is not supported")


def _num_tokens(folder: Path) -> int:
    """Return the largest id of the tokenizer plus 1, also if some ids before it are unused.

    Raises:
        FileNotFoundError: there is no ``tokenizer.json``.
        ValueError: ``tokenizer_config.json`` has tokens that it lacks. Their rows may be trained,
            and a sink would take the first of them.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no tokenizer.json: copy that of the model to this folder")
    known = read_tokenizer(path).get_vocab(with_added_tokens=True).values()
    settings = folder / "tokenizer_config.json"
    added = (read_json_object(settings).get("added_tokens_decoder") if settings.is_file() else None) or {}
    if not isinstance(added, dict):
        raise ValueError(f"{settings}: added_tokens_decoder is not an object from ids to tokens: copy the file again")
    if missing := {int(key) for key in added if key.isdecimal()} - set(known):
        raise ValueError(f"{path} lacks the token {min(missing)}, which {settings.name} has: add it to tokenizer.json")
    return max(known, default=-1) + 1


def _config(theirs: GPTNeoXConfig, sink: str) -> SinkGPTNeoXConfig:
    """Return their configuration with a sink; activation, rotary settings and so on are kept."""
    foreign = {"sink", "model_type", "architectures", "transformers_version"}
    fields = {key: value for key, value in theirs.to_dict().items() if key not in foreign}
    return SinkGPTNeoXConfig(**fields, sink={"kind": sink})


@torch.no_grad()
def _grow(model: SinkGPTNeoXForCausalLM) -> int:
    """Add rows to embedding and head, up to a multiple of 128. Returns their number."""
    old = model.config.vocab_size
    new = (old // VOCABULARY_MULTIPLE + 1) * VOCABULARY_MULTIPLE
    model.resize_token_embeddings(new, mean_resizing=False)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        layer.weight[old:] = layer.weight[:old].double().mean(dim=0).to(layer.weight)
    return new - old


def _card(source: str | Path, revision: str | None, imported: Imported, sink_row: SinkRow) -> str:
    config, added = imported.config, imported.num_new_rows
    row = f"The embedding of the sink token {', '.join(map(str, config.sink_token_ids))} is {ROWS[SinkRow(sink_row)]}."
    return CARD.format(
        name=imported.folder.absolute().name,
        source=f"{source}@{revision}" if revision else source,
        commit=f" (commit {imported.commit})" if imported.commit else "",
        kind=config.sink_kind,
        sink=row if config.num_sinks else "It has no sink token.",
        but=" except this row" if config.num_sinks else "",
        rows=f" Embedding and head have {added} unused rows more, with the mean of the others." if added else "",
    )
