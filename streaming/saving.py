"""Saves the streams of a cache in a safetensors file, and loads them for the same model."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..files import atomic_file, named_errors
from .advice import refuse_without_weights
from .counters import StreamCounters
from .memory import MemoryOptions
from .record import TextRecord
from .rule import StreamShape
from .streams import Streams
from .wrappers import decoder_of

if TYPE_CHECKING:
    from .cache import StreamingCache

FORMAT = "sinklm-streaming-cache"
# Versions of sinklm without memory load files of the first version only.
VERSION_WITHOUT_MEMORY, VERSION_WITH_MEMORY = 1, 2
NEWEST_VERSION = VERSION_WITH_MEMORY  # that this code loads
NUM_SAMPLES = 64  # elements of each weight in the fingerprint, besides the sum of all
# Settings that do not change keys and values, or that the weights and the dtype show.
IRRELEVANT = {
    *("architectures", "transformers_version", "dtype", "torch_dtype", "use_cache", "quantization_config"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "id2label", "label2id", "return_dict", "problem_type"),
    *("output_attentions", "output_hidden_states", "tie_word_embeddings", "initializer_range"),
}


def save_cache(cache: "StreamingCache", path: Path, notes: dict[str, Any] | None = None) -> None:
    """Save a cache, see `StreamingCache.save`; ``notes`` is JSON to store in the same file."""
    cache.check_whole()
    if cache.step is not None:
        raise ValueError("a StreamingCache cannot be saved during a forward pass: save it after the pass")
    streams = cache.streams
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors_of(streams).items()}
    state = json.dumps(
        {
            "version": VERSION_WITHOUT_MEMORY if cache.memory is None else VERSION_WITH_MEMORY,
            "num_kept": cache.shape.num_kept,
            "window": cache.shape.window,
            "chunk_size": cache.chunk_size,
            "kv_dtype": cache.kv_dtype,
            "memory": None if cache.memory is None else asdict(cache.memory.options),
            "num_since_rebase": streams.num_since_rebase,
            "is_ragged": streams.is_ragged,
            "has_failed": streams.has_failed,
            "knows_text": streams.record is None or streams.record.is_known,
            "dtype": str(cache.decoder.dtype),
            "config": relevant_config(cache.decoder),
            "weights": fingerprint(cache.decoder),
            "notes": notes or {},
        }
    )
    metadata = {"format": FORMAT, "state": state, "sha256": digest(state, tensors)}
    with named_errors(path), atomic_file(path, binary=True) as file:
        file.write(save(tensors, metadata))


def load_cache(path: Path, model: PreTrainedModel) -> tuple["StreamingCache", dict[str, Any]]:
    """Load a cache and its notes, see `StreamingCache.load`."""
    from .cache import StreamingCache

    refuse_without_weights(decoder_of(model))
    state, tensors = read_file(path)
    check_model(path, state, model)
    shape = StreamShape(state["num_kept"], state["window"])
    memory = MemoryOptions(**state["memory"]) if state.get("memory") else None
    cache = StreamingCache(model, shape, state["chunk_size"], state["kv_dtype"], memory)
    streams = cache.streams
    streams.num_since_rebase, streams.is_ragged = state["num_since_rebase"], state["is_ragged"]
    streams.has_failed = state.get("has_failed", False)  # not in older files
    if not tensors:
        return cache, state["notes"]
    device = cache.decoder.device
    if device.type != "meta":  # else the tensors follow the states of the first pass
        tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        group, _, part = name.rpartition(".")
        groups.setdefault(group, {})[part] = tensor
    streams.counters = StreamCounters(**groups["counters"]).copy()
    streams.record = TextRecord(**groups["record"], is_known=state["knows_text"]).copy()
    for index, layer in enumerate(streams.layers):
        if f"layers.{index}" not in groups:
            continue  # the model has fewer layers than its config says
        layer.set_buffers(groups[f"layers.{index}"])
        if layer.memory is not None:
            layer.memory.set_buffers(groups[f"memories.{index}"])
            layer.memory.blocks.set_buffers(groups.get(f"blocks.{index}", {}), is_pinned=device.type == "cuda")
    return cache, state["notes"]


def tensors_of(streams: Streams) -> dict[str, Tensor]:
    """Return all tensors of a cache by name, none if it is empty."""
    if streams.counters is None or streams.record is None:
        return {}
    named = {f"counters.{name}": tensor for name, tensor in vars(streams.counters).items()}
    named |= {"record.digest": streams.record.digest, "record.first_ids": streams.record.first_ids}
    for index, layer in enumerate(streams.layers):
        named |= {f"layers.{index}.{name}": buffer for name, buffer in layer.buffers.items()}
        if layer.memory is not None:
            named |= {f"memories.{index}.{name}": buffer for name, buffer in layer.memory.buffers.items()}
            named |= {f"blocks.{index}.{name}": buffer for name, buffer in layer.memory.blocks.buffers.items()}
    return named


def read_file(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read and verify a file.

    Raises:
        ValueError: the file is damaged, or is not one of `save_cache`.
        OSError: it cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"{path} is not a file of StreamingCache.save: choose another file")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no file {path}") from error
    except OSError as error:
        why = "it is a folder, pass a file" if path.is_dir() else error.strerror or error
        raise OSError(f"cannot read {path}: {why}") from error
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged, or no file of StreamingCache.save ({error}): choose another file and read the text "
            "again"
        ) from error
    if digest(metadata.get("state", ""), tensors) != metadata.get("sha256"):
        raise ValueError(f"{path} is damaged (its checksum is wrong): choose another file and read the text again")
    state = json.loads(metadata["state"])
    if state["version"] > NEWEST_VERSION:
        raise ValueError(f"{path} was written by a newer version of sinklm: install that version")
    return state, tensors


def check_model(path: Path, state: dict[str, Any], model: PreTrainedModel) -> None:
    """Raise a ValueError if the cache in a file does not belong to a model."""
    decoder = decoder_of(model)
    config = relevant_config(decoder)
    for name in sorted(config.keys() & state["config"].keys()):  # other versions of transformers have other names
        if config[name] != state["config"][name]:
            raise ValueError(
                f"{path} was saved with another model, whose {name} differs: load that model, or choose another file"
            )
    if state["dtype"] != str(decoder.dtype):
        raise ValueError(
            f"{path} was saved with a model in {state['dtype']}, this model is in {decoder.dtype}: load the model with "
            f"dtype={state['dtype']} (`sinklm`: --dtype {state['dtype'].removeprefix('torch.')})"
        )
    if fingerprint(decoder) != state["weights"]:
        raise ValueError(
            f"{path} was saved with another model: the weights differ. Load the same checkpoint and adapter, or "
            "choose another file"
        )


def relevant_config(decoder: Any) -> dict[str, Any]:
    config = {name: value for name, value in decoder.config.to_dict().items() if name not in IRRELEVANT}
    return json.loads(json.dumps({k: v for k, v in config.items() if not k.startswith("_")}, default=str))


def digest(state: str, tensors: dict[str, Tensor]) -> str:
    """Return the SHA-256 of the content of a file."""
    sha = hashlib.sha256(state.encode())
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(as_bytes(tensor).numpy().data)
    return sha.hexdigest()


@torch.no_grad()
def fingerprint(decoder: nn.Module) -> str:
    """Return a digest of the weights that reads each only once, without copying them to the CPU.

    It consists of the sum of each tensor's bits, as integers, and of samples of them.

    Like a decoding step it reads each weight once, in less time (38 ms and 95 ms for SmolLM2-135M
    in one thread of a CPU). It is not kept for the next save: writes through ``.data``, and those
    of kernels, leave no trace in a tensor's version or address, and the file would name the old
    weights.
    """
    adapters, unused = adapters_of(decoder)
    sha = hashlib.sha256(json.dumps(adapters).encode() if adapters else b"")
    found: dict[torch.device, list[Tensor]] = {}
    for name, weight in weights_of(decoder, unused):
        sha.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        bits = as_bytes(weight)
        if len(bits) == 0:
            continue
        words = bits
        if len(bits) % 8 == 0:
            words = (bits.clone() if bits.storage_offset() % 8 else bits).view(torch.int64)
        samples = words[:: max(1, len(words) // NUM_SAMPLES)].long()
        found.setdefault(weight.device, []).append(torch.cat((words.sum(dtype=torch.int64)[None], samples)))
    for sums in found.values():
        sha.update(torch.cat(sums).cpu().numpy().data)
    return sha.hexdigest()


def adapters_of(decoder: nn.Module) -> tuple[dict[str, Any], set[int]]:
    """Return the state of the adapters of PEFT by layer, and the ids of modules not in use."""
    states: dict[str, Any] = {}
    unused: set[int] = set()
    for prefix, layer in decoder.named_modules():
        active: Any = getattr(layer, "active_adapters", None)
        if not isinstance(active, (str, list)) or not hasattr(layer, "disable_adapters"):
            continue
        active = [active] if isinstance(active, str) else active
        merged, scaling = list(getattr(layer, "merged_adapters", [])), getattr(layer, "scaling", None)
        used = merged + [name for name in active if not layer.disable_adapters]
        scales = [str(scaling.get(name)) for name in used] if isinstance(scaling, dict) else str(scaling)
        states[prefix] = [bool(layer.disable_adapters), active, merged, scales]
        for child in layer.children():
            if isinstance(child, (nn.ModuleDict, nn.ParameterDict)):  # an entry for each adapter
                for name, part in child.items():
                    if name not in used:
                        unused |= {id(part)} | {id(module) for module in getattr(part, "modules", list)()}
    return states, unused


def weights_of(decoder: nn.Module, unused: set[int]) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters and the saved buffers, those that accelerate has offloaded too.

    Args:
        unused: ids of modules and parameters to leave out.
    """
    for prefix, module in decoder.named_modules():
        if id(module) in unused:
            continue
        with in_memory(module):
            saved = {k: v for k, v in module._buffers.items() if k not in module._non_persistent_buffers_set}
            for name, weight in {**module._parameters, **saved}.items():
                if weight is not None and id(weight) not in unused:
                    yield from plain_tensors(f"{prefix}.{name}", weight.detach())


def in_memory(module: nn.Module) -> AbstractContextManager:
    """Context in which the offloaded weights of a module are in memory."""
    if not hasattr(module, "_hf_hook"):
        return nullcontext()
    from accelerate.utils import align_module_device

    return align_module_device(module)


def plain_tensors(name: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors that a weight of a quantized model consists of, or the weight itself."""
    if hasattr(weight, "__tensor_flatten__"):
        for part in weight.__tensor_flatten__()[0]:
            yield from plain_tensors(f"{name}.{part}", getattr(weight, part))
    else:
        yield name, weight


def as_bytes(tensor: Tensor) -> Tensor:
    """Return the bytes ``(N,)`` of a tensor."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)
