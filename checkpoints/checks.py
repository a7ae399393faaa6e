"""Checks of a model folder: its code is never run, and its configuration fits its weights."""

import math
import re
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..parsing import parse_json
from ..rust import is_panic, silent_stderr
from ..text import message_of, one_line

LARGEST_SIZE = 2**31 - 1
MOST = {"num_hidden_layers": 10_000, "num_labels": 1_000_000}
LARGEST_JSON = 2**26  # bytes
SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
)
ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def checked_config(folder: str) -> PreTrainedConfig:
    """Return the configuration of a model folder or Hub name.

    Raises:
        OSError: ``config.json`` cannot be found.
        ValueError: it is not a configuration of a model that transformers knows, or its values are
            impossible.
    """
    path = Path(folder) / "config.json"
    if path.is_file():
        _check_values(read_json_object(path), path)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except OSError:
        raise
    except Exception as error:  # transformers' configurations raise anything for wrong values
        if "trust_remote_code" in str(error):  # transformers advises to set it
            raise foreign_code(folder) from None
        _, is_wrapped, reason = str(error).rpartition("Error: ")
        raise ValueError(
            f"{path} is not a valid configuration: {one_line(reason if is_wrapped else error)}; correct it, or copy "
            "the config.json of the model again"
        ) from error
    _check_sizes(config.get_text_config(), path)
    implementation = getattr(config, "_attn_implementation", None)
    if isinstance(implementation, str) and "/" in implementation:
        raise ValueError(
            f"{path} asks for the attention code {implementation!r} of the Hub, which is never run: remove "
            "attn_implementation from it"
        )
    if Path(folder).is_dir():
        _check_files(config, Path(folder))
    return config


def foreign_code(folder: str) -> ValueError:
    return ValueError(
        f"{folder} needs code that comes with it, which is never run: use a model and tokenizer of a type that "
        "transformers knows"
    )


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a small JSON file whose top level is an object.

    Raises:
        ValueError: the file is too large or not such a file.
    """
    if path.stat().st_size > LARGEST_JSON:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes, too many for such a file: copy the right file")
    try:
        values = parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({one_line(error)}): copy it again from the model") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a JSON object with keys: copy it again from the model")
    return values


def _check_values(values: dict[str, Any], path: Path) -> None:
    """Check values on which transformers fails without naming the key, or very late."""
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        code = "; the code that comes with it (auto_map) is never run" if "auto_map" in values else ""
        raise ValueError(
            f"{path}: transformers {transformers.__version__} has no model_type {model_type!r}: use a model of a known "
            f"type, or another version of transformers{code}"
        )
    for key, value in values.items():
        if key in (*SIZES, "num_labels"):
            _check_size(key, value, path)
        if isinstance(value, float) and (not math.isfinite(value) or ("eps" in key and value < 0)):
            raise ValueError(f"{path}: {key} is {value!r}: it must be a finite number, and an epsilon at least 0")
        if key in ACTIVATIONS and isinstance(value, str) and value not in ACT2FN:
            raise ValueError(f"{path}: {key} is {value!r}: transformers has no such activation function")
        if key in ("dtype", "torch_dtype") and value is not None and not isinstance(value, dict):
            dtype = getattr(torch, value, None) if isinstance(value, str) else None
            if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
                raise ValueError(f"{path}: {key} is {value!r}: it must be float32, bfloat16 or float16")
    for key in ("rope_parameters", "rope_scaling"):
        if isinstance(values.get(key), dict):
            _check_rotary(key, values[key], path)


def _check_rotary(name: str, rope: dict[str, Any], path: Path) -> None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    known = ("default", *ROPE_INIT_FUNCTIONS)
    if name == "rope_parameters" and kind not in known:  # `rope_scaling` has older names, which transformers maps
        raise ValueError(f"{path}: {name}.rope_type is {kind!r}: it must be one of {', '.join(known)}")
    limits = {"rope_theta": math.inf, "partial_rotary_factor": 1, "factor": math.inf}
    for key, largest in limits.items():
        value = rope.get(key)
        if value is not None and not (isinstance(value, int | float) and 0 < value <= largest and value < math.inf):
            most = f" and at most {largest}" if largest < math.inf else ""
            raise ValueError(f"{path}: {name}.{key} is {value!r}: it must be a finite number above 0{most}")


def _check_sizes(config: PreTrainedConfig, path: Path) -> None:
    # A configuration whose layers differ, such as that of Gemma 4, refuses to give their sizes.
    for layer in config.per_layer_config if getattr(config, "is_heterogeneous", False) else [config]:
        for key in SIZES:  # under the names of other model types too, such as n_embd
            _check_size(key, getattr(layer, key, None), path)
        heads, size = getattr(layer, "num_attention_heads", None), getattr(layer, "hidden_size", None)
        if not isinstance(heads, int) or not isinstance(size, int):
            continue
        if getattr(layer, "head_dim", None) is None and size % heads:
            raise ValueError(
                f"{path}: hidden_size {size} is not a multiple of num_attention_heads {heads}: correct one"
            )


def _check_size(key: str, value: Any, path: Path) -> None:
    largest = MOST.get(key, LARGEST_SIZE)
    if isinstance(value, int | float) and (not isinstance(value, int) or not 1 <= value <= largest):
        raise ValueError(f"{path}: {key} is {value!r}: it must be a whole number from 1 to {largest:,}")


def _check_files(config: PreTrainedConfig, folder: Path) -> None:
    """Compare a configuration with the list of tensors in the weights.

    Building a model of a million layers takes minutes; each layer has at least one tensor.
    """
    if (folder / "generation_config.json").is_file():
        read_json_object(folder / "generation_config.json")
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder} contains an adapter (adapter_config.json): merge it into its model, and use that")
    if (folder / "pytorch_model.bin").is_file() and not (folder / WEIGHTS).is_file() and not (folder / INDEX).is_file():
        raise ValueError(
            f"{folder} has its weights only as a pickle (pytorch_model.bin), which can contain code and is never read: "
            "convert them to model.safetensors with save_pretrained of transformers, or a GPT-NeoX with sinklm import"
        )
    dtypes = _dtypes(folder)
    num_layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if dtypes and isinstance(num_layers, int) and num_layers > len(dtypes):
        raise ValueError(
            f"{folder / 'config.json'}: num_hidden_layers is {num_layers}, but the weights have only {len(dtypes)} "
            "tensors: use the weights and the config.json of the same model"
        )
    for name, dtype in dtypes.items():
        is_float = dtype.startswith(("F", "BF"))
        if not is_float and name.endswith(".weight") and getattr(config, "quantization_config", None) is None:
            raise ValueError(
                f"the weights in {folder} have {name} of type {dtype}, which is not a floating-point type, and "
                "config.json has no quantization_config: convert them to bfloat16 or float32"
            )


def _dtypes(folder: Path) -> dict[str, str]:
    """Return the dtypes of the tensors in safetensors files, by name; empty without such files.

    Raises:
        ValueError: a file is damaged or missing.
    """
    return {name: dtype for path in weight_files(folder) for name, dtype in _header(path).items()}


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files with the weights of a model; none if it has no such files.

    Raises:
        ValueError: their index is damaged, or a file that it lists is missing.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        return []
    shards = read_json_object(folder / INDEX).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise ValueError(f"{folder / INDEX} has no weight_map from tensors to files: copy it again from the model")
    names = sorted(set(shards.values()))
    for name in names:
        if Path(name).name != name:
            raise ValueError(f"{folder / INDEX} names the file {name!r} outside of its folder: copy it again")
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no {name}, which {INDEX} lists: copy the missing file")
    return [folder / name for name in names]


def weight_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the weights of a model by name, from the headers of its files.

    Raises:
        FileNotFoundError: it has no safetensors.
        ValueError: a file is damaged, or shorter or longer than its header says.
    """
    files = weight_files(folder)
    if not files:
        raise FileNotFoundError(f"{folder} has no file named {WEIGHTS}")
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as tensors:
                shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise damaged_weights(folder, error) from error
    return shapes


def damaged_weights(folder: str | Path, error: Exception) -> ValueError:
    return ValueError(f"the weights in {folder} are damaged ({error}): copy them again or use another checkpoint")


def _header(path: Path) -> dict[str, str]:
    """Return the dtypes of the tensors in a safetensors file."""
    try:
        with open(path, "rb") as file:
            start = file.read(8)
            if start == b"version ":
                raise ValueError("the file is a pointer of Git LFS; run git lfs pull")
            length = int.from_bytes(start, "little")
            if not 0 < length <= min(LARGEST_JSON, path.stat().st_size - 8):
                raise ValueError(f"a length of {length:,} bytes, in a file of {path.stat().st_size:,}")
            tensors = parse_json(file.read(length))
        return {name: tensor["dtype"] for name, tensor in tensors.items() if name != "__metadata__"}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"the weights in {path.parent} are damaged (header of {path.name}: {one_line(error)}): copy them again"
        ) from error


# Buffers that older versions of transformers saved; models compute them.
SAVED_BUFFERS = r"inv_freq$|masked_bias$|attn\.bias$|attention\.bias$"


def check_loaded(model: PreTrainedModel, info: dict[str, Any], folder: str) -> None:
    """Check that the weights are those of the model, and finite.

    Args:
        info: the loading info of `from_pretrained`.

    Raises:
        ValueError: as `check_names`, or a parameter is NaN or infinite.
    """
    check_names(model.config, info, folder)
    if (name := first_nonfinite(model)) is not None:
        raise ValueError(
            f"the weights in {folder} are not finite ({name} has NaN or infinite values): the checkpoint is damaged "
            "or its training diverged; use another"
        )


def check_names(config: PreTrainedConfig, info: dict[str, Any], folder: str) -> None:
    """Check that the names and shapes of weights are those of a model.

    Args:
        info: ``missing_keys``, ``mismatched_keys`` and ``unexpected_keys``, as in the loading info
            of `from_pretrained`.

    Raises:
        ValueError: a parameter is not in the weights or has another shape, so transformers would
            draw it at random; or the weights have a layer that the model does not have.
    """
    if info["missing_keys"]:
        raise ValueError(
            f"the weights in {folder} lack {sorted(info['missing_keys'])[0]}, which its config.json requires: use the "
            "weights and the config.json of the same model"
        )
    for key, in_file, in_model in sorted(info["mismatched_keys"]):
        raise ValueError(
            f"the weights in {folder} have {key} of shape {tuple(in_file)}, but the model of its config.json needs "
            f"{tuple(in_model)}: use the weights and the config.json of the same model"
        )
    num_layers = getattr(config.get_text_config(), "num_hidden_layers", math.inf)
    for key in sorted(info["unexpected_keys"]):
        layer = re.search(r"\.(\d+)\.", key)
        is_ours = config.model_type in ("gpt_neox", "sink_gpt_neox") and not re.search(SAVED_BUFFERS, key)
        if is_ours or (layer and int(layer[1]) >= num_layers):
            raise ValueError(
                f"the weights in {folder} contain {key}, which the model of its config.json does not have: use the "
                "weights and the config.json of the same model"
            )


@torch.no_grad()
def first_nonfinite(model: PreTrainedModel) -> str | None:
    """Return the name of the first parameter with a NaN or infinite value, None if there is none.

    One pass through the weights at the speed of memory: 0.05 s for each GB on a CPU core, without a
    copy. `torch.isfinite` takes 30 times as long.
    """
    for name, parameter in model.named_parameters():
        has_infinity = parameter.is_floating_point() and parameter.itemsize > 1  # not all 8-bit types do
        if has_infinity and parameter.numel() and not torch.stack(torch.aminmax(parameter)).isfinite().all():
            return name
    return None


def read_tokenizer(path: str | Path) -> Tokenizer:
    """Read a ``tokenizer.json``.

    Raises:
        ValueError: the file is not a tokenizer.
    """
    try:
        with silent_stderr():
            return Tokenizer.from_file(str(path))
    except BaseException as error:  # tokenizers raises bare exceptions, and panics
        if not (isinstance(error, Exception) or is_panic(error)):
            raise
        raise ValueError(
            f"{path} is not a tokenizer.json ({message_of(error)}): copy that of the model again"
        ) from None


# Short texts on which a regular expression with nested repetitions needs exponential time.
PROBES = ("a", " ", "1", "\n", ".", "aA1 ", "'s", "é")
SLOW = 0.5  # seconds for a text of at most 65 characters


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str) -> None:
    """Tokenize short repetitive texts, longer ones after shorter ones.

    A tokenizer contains regular expressions of its author. Their engine gives up after about 0.1 s
    for a match, with a Rust panic, so no text takes forever; texts of a kind not tried here can
    still be slow.

    Raises:
        ValueError: the tokenizer fails on one, or needs more than `SLOW` seconds of processor time.
    """
    for text in ((probe * length)[:length] + "!" for length in (8, 16, 32, 64) for probe in PROBES):
        started, used = time.monotonic(), time.process_time()
        try:
            with silent_stderr():
                tokenizer(text)
        except BaseException as error:
            if not (isinstance(error, Exception) or is_panic(error)):
                raise
            raise ValueError(
                f"the tokenizer in {folder} fails on the text {text[:12]!r}… of {len(text)} characters "
                f"({message_of(error)}): copy the tokenizer.json of the model again, or use another model"
            ) from None
        # Processor time: on a loaded machine the clock also counts waiting. That of the whole
        # process: tokenizers has threads of its own. Other threads of the process count in it,
        # but not in the clock.
        if min(time.monotonic() - started, time.process_time() - used) > SLOW:
            raise ValueError(
                f"the tokenizer in {folder} needs more than {SLOW} s of processor time for {text[:12]!r}… of "
                f"{len(text)} characters: its tokenizer.json has a regular expression that takes exponential "
                "time; use another tokenizer"
            )
