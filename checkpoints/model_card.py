"""The README of an exported model: architecture, training, loading and streaming."""

from importlib import metadata
from pathlib import Path
from re import fullmatch
from textwrap import fill
from typing import Any

from transformers import PreTrainedModel

from ..files import fingerprint_of
from ..models.config import SinkGPTNeoXConfig, default_num_kept, describe_windows, trained_windows
from ..parsing import named_damage, parse_json, parse_yaml
from .checksums import verify_description
from .folders import CONFIG_FILE, ENVIRONMENT_FILE, METRICS_FILE, STATE_FILE, read_state
from .full_attention import AttentionCost
from .weight_types import name_of

TEMPLATE = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- gpt_neox
- attention-sink
- streaming
---

# {name}

A Pythia-style (GPT-NeoX) language model of {num_parameters:,} parameters, trained with sinklm \
{with_sinks}.

| | |
|---|---|
{facts}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}")
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0], skip_special_tokens=True))
```

{notes}## Stream

Generate text of any length in constant memory: the cache keeps {kept}the {window} most \
recent tokens.

```python
from sinklm import StreamingCache

cache = StreamingCache.for_model(model, num_kept={num_kept}, window={window})
model.generate(**inputs, past_key_values=cache, max_new_tokens=10_000)
```

## Licence

The publisher of this model chooses its licence. The training texts, and a model from whose weights
the training started, have their own licences.
"""

SINK_NOTES = """\
The model was trained with {names} in front of every text, as a place for surplus attention. The
tokenizer adds it automatically. Keep it in fine-tuning (no `add_special_tokens=False`) and when long
texts are truncated on the left; begin a chat template with it (`{{{{ bos_token }}}}`). It is never
generated (`suppress_tokens` in `generation_config.json`).

"""

WINDOW_NOTES = (
    "The model was trained with {windows}. Plain GPT-NeoX has none, so this copy has full attention in all layers: "
    "{cost}."
)
OWN_FOLDERS = ("runs", "imported", "exports", "models", "checkpoints")  # no owner's name on the Hub
SAME_STREAM = " With the cache below, every layer computes what it was trained with."


def model_card(
    model: PreTrainedModel, folder: Path, name: str, sink_names: list[str], cost: AttentionCost | None = None
) -> str:
    """Return the model card (Markdown) of a model that was loaded from ``folder``.

    It includes facts about the training run if ``folder`` is in a run folder.

    Args:
        cost: of full attention in place of the model's windows, if it has any.
    """
    num_sinks = len(sink_names)
    num_kept, window = _stream_shape(model.config)
    if num_sinks:
        notes = SINK_NOTES.format(names=f"`{''.join(sink_names)}`")
        with_sinks = "with a learnable sink token" if num_sinks == 1 else f"with {num_sinks} learnable sink tokens"
    else:
        notes, with_sinks = "", "without a sink token"
    if cost is not None:
        stream = SAME_STREAM if len(set(model.config.windows)) == 1 else ""
        windows = describe_windows(trained_windows(model.config))
        notes += fill(WINDOW_NOTES.format(windows=windows, cost=cost) + stream, width=100) + "\n\n"
    facts = architecture_facts(model) | run_facts(folder)
    return TEMPLATE.format(
        name=name,
        num_parameters=sum(p.numel() for p in model.parameters()),
        with_sinks=with_sinks,
        facts="\n".join(f"| {key} | {value} |" for key, value in facts.items()),
        notes=notes,
        num_kept=num_kept,
        kept="the sink and "
        if num_kept == num_sinks == 1
        else "the first token and "
        if num_kept == 1
        else f"the first {num_kept} tokens and " * (num_kept > 0),
        window=window,
    )


def _stream_shape(config: SinkGPTNeoXConfig) -> tuple[int, int]:
    """Return the cache of the example: that of the windows, or half of the trained length."""
    if config.has_windows and len(set(config.windows)) == 1:
        return config.num_kept or 0, config.windows[0] or 0
    num_kept = default_num_kept(config)
    return num_kept, max(config.max_position_embeddings // 2 - num_kept, 1)


def architecture_facts(model: PreTrainedModel) -> dict[str, str]:
    config = model.config
    return {
        "Layers, width, heads": f"{config.num_hidden_layers}, {config.hidden_size}, {config.num_attention_heads}",
        "Longest sequence": f"{config.max_position_embeddings:,} positions, sinks included",
        "Vocabulary": f"{config.vocab_size:,} rows",
        "Sink token ids": ", ".join(map(str, config.sink_token_ids)) or "none",
        "Weights": name_of(model.dtype),
    }


def run_facts(folder: Path) -> dict[str, str]:
    """Return facts about the training of ``<run>/checkpoints/step-<N>/model`` from its files."""
    checkpoint = folder.absolute().parent
    if not (checkpoint / STATE_FILE).exists():
        return {"Exported by": f"sinklm {metadata.version('sinklm')}"}
    verify_description(checkpoint)
    state = read_state(checkpoint)
    with named_damage(checkpoint / CONFIG_FILE, "restore it, or use another checkpoint"):
        config = parse_yaml((checkpoint / CONFIG_FILE).read_bytes())
        train = config["train"]
        facts = _origin_facts(config["model"].get("init_from"), train.get("only_sinks", False)) | {
            "Steps": f"{state.step:,} of {train['num_steps']:,}",
            "Positions seen, in this run": f"{state.positions:,} ({train['batch_size_tokens']:,} a step)",
            "Sequence length": f"{train['seq_length']:,}",
            "Highest learning rate": f"{config['optimizer']['lr']:g}",
            "Precision": state.precision,
            "Seed": str(train["seed"]),
        }
        store, weights = Path(config["data"]["path"] or ""), config["data"].get("weights")
    run = checkpoint.parent.parent
    facts |= _loss_facts(run / METRICS_FILE, state.step)
    facts |= _data_facts(store, state.data_fingerprint, weights)
    return facts | _version_facts(run / ENVIRONMENT_FILE)


def _origin_facts(init_from: str | None, only_sinks: bool) -> dict[str, str]:
    """Return the model that a run started from, without a local path, and what was trained."""
    if init_from is None:
        return {}
    path, is_name = Path(init_from), fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", init_from)
    if is_name and path.parts[0] not in OWN_FOLDERS and not path.exists():
        source = init_from
    else:
        parts = [part for part in path.absolute().parts if not fullmatch(r"checkpoints|step-\d+|model|\.\.", part)]
        source = f"a model in the folder {parts[-1]}"
    trained = "the embeddings of the sink tokens alone" if only_sinks else "all weights"
    return {"Started from the weights of": source, "Trained": trained}


def _loss_facts(metrics: Path, num_steps: int) -> dict[str, str]:
    """Return the last training and validation loss logged up to the checkpoint's step.

    A loss of an earlier step, such as that of the last validation, has this step beside it.
    """
    if not metrics.exists():
        return {}
    facts: dict[str, str] = {}
    for line in metrics.read_text(encoding="utf-8", errors="replace").splitlines():
        record = _read_line(line)
        step = record.get("step")
        if not isinstance(step, int) or step > num_steps:
            continue
        for key, name in {"loss": "Training loss", "validation_loss": "Validation loss"}.items():
            if isinstance(loss := record.get(key), int | float):
                facts[name] = f"{loss:.4f} nats per token" + f" at step {step:,}" * (step < num_steps)
    return facts


def _read_line(line: str) -> dict[str, Any]:
    """Return the values of a line, or none of a line that is damaged or being written."""
    try:
        record = parse_json(line)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _data_facts(store: Path, fingerprint: str, weights: dict[str, float] | None) -> dict[str, str]:
    """Return the sets of the run's token store with their shares of the samples.

    Args:
        fingerprint: of the data that was trained on. If the folder has other data now, none are
            returned.
        weights: of the sets, ``data.weights``; None: every token is read equally often.
    """
    path = store / "manifest.json"
    if not path.exists():
        return {}
    with named_damage(path):
        manifest = parse_json(path.read_bytes())
        if fingerprint_of({name: file["sha256"] for name, file in manifest["files"].items()}) != fingerprint:
            return {}
        train = manifest["splits"]["train"]
        total = train["total"]["tokens"]
        parts = weights or {name: counts["tokens"] for name, counts in train["sets"].items()}
        shares = {name: part / sum(parts.values()) for name, part in parts.items() if part}
    sets = ", ".join(f"{name} {share:.1%}" for name, share in sorted(shares.items(), key=lambda item: -item[1]))
    return {"Training data": f"{total:,} tokens{', read by weight' if weights else ''}: {sets}"}


def _version_facts(environment: Path) -> dict[str, str]:
    if not environment.exists():
        return {}
    with named_damage(environment):
        recorded = parse_json(environment.read_bytes())
        versions = {"sinklm": recorded["sinklm"]["version"]} | {
            name: version for name, version in recorded.items() if isinstance(version, str) and name != "devices"
        }
    return {"Trained with": ", ".join(f"{name} {version}" for name, version in versions.items())}
