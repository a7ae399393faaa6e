"""Finding the model and its decoder inside of wrappers (PEFT, data parallelism, compilation)."""

import os
from typing import Any

from torch import nn
from transformers import PreTrainedModel

UNSUPPORTED_PEFT = (
    "streaming does not support {} of PEFT, which adds virtual tokens: use a method that changes weights, such as LoRA"
)
OF_A_PASS = ("LILY", "SHADOW", "XLORA")  # methods of PEFT that add to a token what depends on its whole pass


def unwrapped(model: Any) -> PreTrainedModel:
    """Return the transformers model inside of wrappers.

    Raises:
        TypeError: ``model`` is the name or path of a model.
        ValueError: there is no model, or a wrapper cannot stream.
    """
    if isinstance(model, str | os.PathLike):
        raise TypeError(f"a loaded model is needed and not its name: pass sinklm.load_model({str(model)!r})")
    while not isinstance(model, PreTrainedModel):
        name = type(model).__name__
        if hasattr(model, "peft_config"):
            refuse_methods(model)
            model = model.get_base_model()
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):  # torch.compile
            model = model._orig_mod
        elif isinstance(getattr(model, "module", None), nn.Module):  # data parallelism, DeepSpeed
            if len(getattr(model, "device_ids", None) or ()) > 1:
                raise ValueError(
                    f"streaming does not support {name} on several devices, since it copies the model for each pass: "
                    "pass its .module"
                )
            model = model.module
        else:
            raise ValueError(f"{name} is not a model of transformers: pass a PreTrainedModel")
    if hasattr(model, "peft_config"):  # the model inside of a wrapper of PEFT has it too
        refuse_methods(model)
    return model


def refuse_methods(model: Any) -> None:
    """Raise a ValueError for methods of PEFT that do not only change weights.

    They add virtual tokens or keys of their own, or depend on how a text is divided into passes.
    """
    for config in model.peft_config.values():
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        is_activated = bool(getattr(config, "alora_invocation_tokens", None))
        if is_activated or kind in OF_A_PASS:
            name = "LORA with alora_invocation_tokens" if is_activated else kind
            raise ValueError(
                f"streaming does not support {name} of PEFT, whose result depends on how a text is divided into "
                "passes: use a method that changes weights, such as LoRA"
            )
        if getattr(config, "is_prompt_learning", False) or kind == "ADAPTION_PROMPT":
            raise ValueError(UNSUPPORTED_PEFT.format(kind))


def refuse_prompts_of_owner(model: Any) -> None:
    """Raise a ValueError if PEFT's `generate` calls a model with virtual tokens.

    The cache may have been created for the model inside the wrapper.
    """
    owner = getattr(model.prepare_inputs_for_generation, "__self__", model)
    if owner is not model and hasattr(owner, "peft_config"):
        refuse_methods(owner)


def decoder_of(model: Any) -> Any:
    """Return the decoder of a model, its part without the head.

    Raises:
        TypeError, ValueError: as `unwrapped`.
    """
    model = unwrapped(model)
    if any(type(module).__name__ == "AdaptedAttention" for module in model.modules()):
        raise ValueError(UNSUPPORTED_PEFT.format("ADAPTION_PROMPT"))
    decoder: Any = model.get_decoder()
    if not isinstance(decoder, PreTrainedModel):  # ModernBERT's attribute `decoder` is the head
        decoder = model.base_model
    inner = getattr(decoder, "model", None)  # Llama 4 returns the model with its head
    return inner if isinstance(inner, PreTrainedModel) else decoder
