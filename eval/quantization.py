"""Quantizes copies of a model: weights, weights with activations, keys and values.

torchao quantizes the linear layers of all blocks; embeddings, norms and the output head stay as
they are, as in transformers. Tokens of sinks go through the same layers as all other tokens.
"""

import copy
from collections.abc import Callable

from ..extras import require_extra

require_extra("quantization")

import torch
import torchao.kernel
from torch import Tensor, nn
from torchao.core.config import AOBaseConfig
from torchao.quantization import (
    Granularity,
    Int8DynamicActivationInt8WeightConfig,
    Int8Tensor,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    MappingType,
    PerGroup,
    PerRow,
    PerTensor,
    quantize_,
)
from transformers import PreTrainedModel

from .quantization_formats import FORMATS, GROUP_SIZE, Format

SCALES: dict[str | None, Granularity] = {"token": PerRow(), "tensor": PerTensor()}  # of activations


def quantized_layers(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Return the linear layers that are quantized, by name: all but the output head.

    Raises:
        ValueError: the model has other matrices, which would silently stay in full precision.
    """
    head = model.get_output_embeddings()
    layers = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head
    }
    owned = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, nn.Linear | nn.Embedding) or module is head
    }
    for name, parameter in model.named_parameters():
        is_column = name.rpartition(".")[2].startswith("sink_")  # key and value of an arm: not a matrix
        if parameter.ndim >= 2 and id(parameter) not in owned and not is_column:
            raise ValueError(
                f"{name} is not the weight of a linear layer, so torchao would not quantize it: models of type "
                f"{model.config.model_type!r} are not supported"
            )
    if not layers:
        raise ValueError(f"models of type {model.config.model_type!r} have no linear layers to quantize")
    return layers


def quantized(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """Return a copy of a model in one of the `FORMATS`; ``kv8`` changes no weight.

    Raises:
        ValueError: a layer does not fit the format; see `check_format`.
    """
    wanted = FORMATS[name]
    if wanted.weights is None:
        return model
    check_format(model, name)
    twin = copy.deepcopy(model)
    layers = quantized_layers(twin)
    is_simulated = wanted.activations is not None and not has_exact_products(model.device)
    quantize_(twin, _config(wanted, is_simulated), filter_fn=lambda module, path: path in layers)
    if is_simulated:
        for layer in layers.values():
            layer.register_forward_pre_hook(_rounded_input(SCALES[wanted.activations]))
    return twin


def check_format(model: PreTrainedModel, name: str) -> None:
    """Raise a ValueError if a model cannot be quantized in a format, without quantizing it."""
    layers = quantized_layers(model)
    if FORMATS[name].weights != "int4":
        return
    for path, layer in layers.items():
        if layer.in_features % GROUP_SIZE:
            raise ValueError(
                f"{name} requires widths that are multiples of {GROUP_SIZE}, but {path} has {layer.in_features} "
                f"inputs: leave {name} out of --formats"
            )


def arithmetic(name: str, device: torch.device, num_kept: int = 0) -> str:
    """Say how a format is computed on a device, for the report.

    Args:
        num_kept: tokens that windowed layers keep, in full precision.
    """
    wanted = FORMATS[name]
    if wanted.kv_dtype:
        exact = f" but for {num_kept} kept tokens" if num_kept else ""
        return f"quantized in the cache{exact}, read in the model's type"
    if wanted.activations is None:
        return "weights rounded by torchao, products in the model's type"
    if has_exact_products(device):
        return "int8 products of torchao"
    return "simulated: inputs and weights rounded by torchao, products in the model's type"


def has_exact_products(device: torch.device) -> bool:
    """Whether torchao's int8 products are exact on a device, tried with the largest values.

    Some CPUs add products of 8 bits in saturating 16 bits.
    """
    rows, width = 32, 64
    left = torch.full((rows, width), 127, dtype=torch.int8)
    left[1::2] = -128
    right = torch.full((width, rows), 127, dtype=torch.int8)
    right[:, 1::2] = -128
    exact = left.double() @ right.double()
    scales = torch.ones(rows, 1, device=device)
    try:
        found = torchao.kernel.int_scaled_matmul(left.to(device), right.to(device), scales)
    except (RuntimeError, NotImplementedError, AssertionError):
        return False
    return bool((found.cpu().double() == exact).all())


def _config(wanted: Format, is_simulated: bool) -> AOBaseConfig:
    if wanted.weights == "int4":
        return IntxWeightOnlyConfig(
            weight_dtype=torch.int4,  # type: ignore[attr-defined]
            granularity=PerGroup(GROUP_SIZE),
            mapping_type=MappingType.ASYMMETRIC,
        )
    if wanted.activations is None or is_simulated:
        return Int8WeightOnlyConfig(set_inductor_config=False)
    granularity = [SCALES[wanted.activations], PerRow()]
    return Int8DynamicActivationInt8WeightConfig(granularity=granularity, set_inductor_config=False)


def _rounded_input(granularity: Granularity) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """Return a hook that rounds the input of a layer to int8, as torchao's int8 products do."""

    def rounded(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (Int8Tensor.from_hp(inputs[0], granularity).dequantize(), *inputs[1:])

    return rounded
