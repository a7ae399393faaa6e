"""Pythia-style language model that prepends its own learnable sink tokens.

Parameters have the same names and shapes as in ``GPTNeoXForCausalLM``: a sink token is a row of the
embedding that no text uses. Only `SinkGPTNeoXForCausalLM.forward` differs: it prepends the sinks if
the cache is empty and removes their positions from the logits, so callers never see them.
"""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GPTNeoXForCausalLM, GPTNeoXModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.generation.logits_process import SuppressTokensLogitsProcessor
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding
from transformers.utils import can_return_tuple

from .arms import ARM_PARAMETERS, Gate
from .attention import RULE_ATTENTION, SinkAttention
from .cache_argument import CACHE, single_cache
from .carried import CarriedCausalLMOutput, CarriedKeys, CarriedModelOutput, check_segments
from .config import SinkGPTNeoXConfig
from .layer import SinkGPTNeoXLayer
from .loss import IGNORED, linear_cross_entropy
from .run_folders import refuse_run, refuse_runs_in_auto_classes
from .windows import WindowRule, check_positions, check_window, rules_of_pass


class PythiaInitialisation:
    """Initialisation of GPT-NeoX's Pythia configurations, instead of transformers' normal(0.02).

    ``small_init`` (Nguyen & Salazar 2019) for embeddings and most matrices, ``wang_init``
    (Wang & Komatsuzaki 2021) for the matrices that write to the residual stream, 0 for biases.
    """

    config: SinkGPTNeoXConfig

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, SinkAttention | Gate):
            module.initialise()
            return
        if not isinstance(module, nn.Linear | nn.Embedding):
            super()._init_weights(module)  # type: ignore[misc]
            return
        num_layers, hidden_size = self.config.num_hidden_layers, self.config.hidden_size
        writes_residual = any(module is m for m in self._residual_outputs())
        std = 2 / (num_layers * math.sqrt(hidden_size)) if writes_residual else math.sqrt(2 / (5 * hidden_size))
        init.normal_(module.weight, std=std)
        if getattr(module, "bias", None) is not None:
            init.zeros_(module.bias)

    def _residual_outputs(self) -> Iterator[nn.Module]:
        for layer in self.base_model.layers:  # type: ignore[attr-defined]
            yield from (layer.attention.dense, layer.mlp.dense_4h_to_h)


class CheckedLoading:
    """Loads the model of a folder, or raises an error where transformers would load another one."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """Like the method of transformers, but parameters of another arm raise an error.

        transformers would ignore them.

        Raises:
            ValueError: the weights were trained with another ``sink.kind``.
            OSError: the folder is that of a run or of a checkpoint, which contains that of a model.
        """
        name = pretrained_model_name_or_path
        refuse_run(Path(str(name)) / (kwargs.get("subfolder") or ""))
        model, info = super().from_pretrained(name, *args, output_loading_info=True, **kwargs)  # type: ignore[misc]
        if foreign := sorted(key for key in info["unexpected_keys"] if re.search(ARM_PARAMETERS, key)):
            raise ValueError(
                f"{name} contains the parameter {foreign[0]}, which sink.kind={model.config.sink_kind!r} does not "
                "have: load the model with the sink.kind that it was trained with"
            )
        return (model, info) if output_loading_info else model


class SinkGPTNeoXModel(CheckedLoading, PythiaInitialisation, GPTNeoXModel):
    """The decoder without the language-model head. It does not prepend sinks."""

    config_class = SinkGPTNeoXConfig
    config: SinkGPTNeoXConfig

    _no_split_modules: ClassVar[list[str]] = ["SinkGPTNeoXLayer"]

    def __init__(self, config: SinkGPTNeoXConfig):
        super(GPTNeoXModel, self).__init__(config)
        self.embed_in = nn.Embedding(config.vocab_size, config.hidden_size)
        self.emb_dropout = nn.Dropout(config.hidden_dropout)
        self.layers = nn.ModuleList(SinkGPTNeoXLayer(config, i) for i in range(config.num_hidden_layers))
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.rotary_emb = GPTNeoXRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        inputs_embeds=None,
        past_key_values=None,
        use_cache=None,
        cache=None,
        window=None,
        carried=None,
        **kwargs,
    ):
        """Like the method of transformers, for sinks and text.

        Args:
            window, carried: see `SinkGPTNeoXForCausalLM.forward`.
        """
        cache = past_key_values if cache is None else cache
        check_window(self.config, window)
        if inputs_embeds is None and input_ids is not None:
            input_ids, inputs_embeds = None, self.embed_in(input_ids)
        if carried is not None:
            others = {"attention_mask": attention_mask, "position_ids": position_ids, CACHE: cache}
            check_segments(self.config, carried, len(inputs_embeds), others | kwargs)
            return self._segment_forward(inputs_embeds, carried, window)
        if self.config.has_windows and self.config._attn_implementation in RULE_ATTENTION:
            check_positions(position_ids, attention_mask)
            kwargs["rules"] = rules_of_pass(self.config, self.rotary_emb, inputs_embeds, attention_mask, cache, window)
        elif window is not None:
            raise ValueError("window replaces those of a forward pass without a StreamingCache: leave it out")
        further = (value for name, value in kwargs.items() if name != "rules")
        is_plain = all(value is None for value in (attention_mask, position_ids, cache, *further))
        if is_plain and use_cache is False and self._has_causal_forward():
            return self._causal_forward(inputs_embeds, kwargs.get("rules"))
        return super().forward(
            input_ids, attention_mask, position_ids, inputs_embeds, cache, use_cache=use_cache, **kwargs
        )

    def _has_causal_forward(self) -> bool:
        return torch.compiler.is_compiling() and self.config._attn_implementation == "sdpa"

    def _causal_forward(
        self, inputs_embeds: torch.Tensor, rules: dict[int, WindowRule] | None
    ) -> BaseModelOutputWithPast:
        """The same computation without a mask tensor.

        Under `torch.compile`, transformers cannot detect that positions are consecutive and builds
        a mask. With a mask, SDPA also computes the upper triangle, which makes the whole training
        step a quarter slower.
        """
        hidden_states = self.emb_dropout(inputs_embeds)
        positions = torch.arange(hidden_states.shape[1], device=hidden_states.device)[None]
        rotary = self.rotary_emb(hidden_states, position_ids=positions)
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask=None, position_embeddings=rotary, rules=rules)
        return BaseModelOutputWithPast(last_hidden_state=self.final_layer_norm(hidden_states))

    def _segment_forward(self, inputs_embeds: torch.Tensor, carried: CarriedKeys, window) -> CarriedModelOutput:
        """Compute sinks and text ``(B, sinks + T, hidden)`` of a segment after the carried keys."""
        hidden_states, num_sinks = self.emb_dropout(inputs_embeds), self.config.num_sinks
        num_before = 0 if carried.num_tokens is None else carried.num_tokens
        indices = torch.arange(hidden_states.shape[1], device=hidden_states.device)
        positions = torch.where(indices < num_sinks, indices, indices + num_before)[None]
        text = hidden_states[:, num_sinks:]
        rules = rules_of_pass(self.config, self.rotary_emb, text, window=window, num_before=num_before)
        segment = {"rules": rules, "position_embeddings": self.rotary_emb(hidden_states, position_ids=positions)}
        layers = []
        before = [None] * len(self.layers) if carried.is_empty else carried.layers
        for layer, states in zip(self.layers, before, strict=True):
            hidden_states, states = layer(hidden_states, segment=segment | {"carried": states})
            layers.append(states)
        return CarriedModelOutput(
            last_hidden_state=self.final_layer_norm(hidden_states), carried=carried.after(text.shape[1], layers)
        )


class SinkGPTNeoXForCausalLM(CheckedLoading, PythiaInitialisation, GPTNeoXForCausalLM):
    """GPT-NeoX with ``config.num_sinks`` learnable sink tokens in front of every text.

    A sink is never a target and is never sampled. Hidden states, attentions and the cache include
    the sinks' positions; the logits do not.
    """

    config_class = SinkGPTNeoXConfig
    config: SinkGPTNeoXConfig

    def __init__(self, config: SinkGPTNeoXConfig):
        super(GPTNeoXForCausalLM, self).__init__(config)
        self.gpt_neox = SinkGPTNeoXModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
        cache: Cache | None = None,
        window: int | torch.Tensor | None = None,
        carried: CarriedKeys | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Compute logits ``(B, T, V)`` of T tokens and, if ``labels`` are given, the mean loss.

        Args:
            input_ids: ``(B, T)`` text without sinks. Alternatively ``inputs_embeds`` ``(B, T, D)``.
            attention_mask: ``(B, T)``, or ``(B, tokens seen + T)`` with a cache; 0 is padding.
            position_ids: ``(B, T)``, counted from the first text token, without the sinks.
            past_key_values: the cache. If it is empty, sinks are prepended.
            cache: another name of this argument.
            labels: ``(B, T)`` as in transformers, or ``(B, T + 1)``, where the last label is the
                target of the last token. With sinks, label 0 is a target of the last sink.
            skip_logits: return only the loss; logits are computed for one chunk at a time.
            num_items_in_batch: divisor of the summed loss; default: the number of targets.
            window: replaces the windows of all windowed layers in this pass (`check_window`).
            carried: of the segments before this one (`sinklm.models.carried`). The output's is for
                the next one. In later segments label 0 is ignored: it was the last one before.
        """
        cache = single_cache(cache, past_key_values, kwargs)
        num_new_sinks = 0 if _length(cache) else self.config.num_sinks
        batch_size, num_tokens = _shape(input_ids if inputs_embeds is None else inputs_embeds, cache)
        mask = self._extend_mask(attention_mask, batch_size, num_tokens, cache)
        position_ids = self._position_ids(position_ids, mask, num_tokens, num_new_sinks)
        if num_new_sinks:
            input_ids, inputs_embeds = self._prepend_sinks(input_ids, inputs_embeds)

        kwargs |= {"use_cache": use_cache, CACHE: cache, "window": window, "carried": carried}
        outputs = self.gpt_neox(
            input_ids, attention_mask=mask, position_ids=position_ids, inputs_embeds=inputs_embeds, **kwargs
        )
        hidden_states = outputs.last_hidden_state  # (B, sinks + T, D)

        loss = None
        if labels is not None:
            is_later = carried is not None and not carried.is_empty
            aligned = _align_later if is_later else _align
            predictors, targets = aligned(hidden_states, labels, num_new_sinks, attention_mask)
            loss = self._loss(predictors, targets, num_items_in_batch, in_chunks=skip_logits)
        logits = None if skip_logits else self.lm_head(_keep(hidden_states[:, num_new_sinks:], logits_to_keep))

        if carried is not None:
            return CarriedCausalLMOutput(loss=loss, logits=logits, carried=outputs.carried)
        others = {CACHE: getattr(outputs, CACHE), "hidden_states": outputs.hidden_states}
        return CausalLMOutputWithPast(loss=loss, logits=logits, attentions=outputs.attentions, **others)

    def _loss(self, predictors, targets, num_items_in_batch, *, in_chunks: bool) -> torch.Tensor:
        targets = targets.flatten().to(predictors.device)
        if in_chunks:
            return linear_cross_entropy(predictors.flatten(0, 1), self.lm_head.weight, targets, num_items_in_batch)
        return _cross_entropy(self.lm_head(predictors).flatten(0, 1), targets, num_items_in_batch)

    def _prepend_sinks(self, input_ids, inputs_embeds):
        batch_size = (input_ids if inputs_embeds is None else inputs_embeds).shape[0]
        first, num_sinks = self.config.sink_token_ids[0], self.config.num_sinks
        sinks = torch.arange(first, first + num_sinks, device=self.gpt_neox.embed_in.weight.device)
        sinks = sinks.expand(batch_size, num_sinks)
        if inputs_embeds is None:
            return torch.cat([sinks, input_ids], dim=1), None
        return None, torch.cat([self.gpt_neox.embed_in(sinks).to(inputs_embeds.dtype), inputs_embeds], dim=1)

    def _extend_mask(self, mask, batch_size: int, num_tokens: int, cache: Cache | None):
        """Extend a mask over the text by ones for the sinks."""
        if mask is None or not self.config.num_sinks:
            return mask
        if mask.ndim != 2 or mask.shape[0] != batch_size:
            raise ValueError(
                f"attention_mask has shape {tuple(mask.shape)}: a model with sink tokens requires a mask of shape "
                f"(batch, tokens) for a batch of {batch_size}"
            )
        num_seen = _length(cache)
        if not num_seen and not torch.compiler.is_compiling() and ((mask != 0) & (mask != 1)).any():
            raise ValueError(
                "attention_mask has values other than 0 (padding) and 1 (token): pass the mask of the tokenizer, not "
                "one that is added to scores"
            )
        if num_seen and mask.shape[1] == num_seen + num_tokens:  # the caller's mask includes the sinks
            return mask
        num_text = max(num_seen - self.config.num_sinks, 0) + num_tokens
        if mask.shape[1] != num_text:
            raise ValueError(
                f"attention_mask covers {mask.shape[1]} tokens, but the text has {num_text}: both must be equal"
            )
        return torch.cat([mask.new_ones(mask.shape[0], self.config.num_sinks), mask], dim=1)

    def _position_ids(self, position_ids, mask, num_tokens: int, num_new_sinks: int):
        """Positions of the sinks and the text; None if positions follow from the cache's length."""
        num_sinks = self.config.num_sinks
        if not num_sinks:
            return position_ids
        if position_ids is None:
            if mask is None:
                return None
            # Padding between sinks and text has no positions: the first token follows the sinks.
            return (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -(num_tokens + num_new_sinks) :]
        text = position_ids + num_sinks
        sinks = torch.arange(num_new_sinks, device=text.device).expand(*text.shape[:-1], -1)
        return torch.cat([sinks, text], dim=-1)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs) -> nn.Embedding:
        """Like the method of transformers, but never removes the rows of the sinks.

        The length of a tokenizer does not include the sinks.

        Raises:
            ValueError: the new size would remove a sink token.
        """
        needed = max(self.config.sink_token_ids, default=-1) + 1
        if new_num_tokens is not None and new_num_tokens < needed:
            raise ValueError(
                f"resizing the embedding to {new_num_tokens} rows would remove the sink token {needed - 1}: keep at "
                f"least {needed} rows"
            )
        return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)

    # -- Generation: `generate` counts text tokens only, the cache also counts the sinks ---------

    def prepare_inputs_for_generation(
        self,
        input_ids,
        next_sequence_length=None,
        past_key_values=None,
        inputs_embeds=None,  # must be in the signature, or `generate` does not accept embeddings
        is_first_iteration=False,
        cache=None,
        **kwargs,
    ):
        cache = single_cache(cache, past_key_values, kwargs)
        if is_first_iteration and next_sequence_length is not None and _length(cache):
            next_sequence_length += self.config.num_sinks
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **{CACHE: cache},
            **kwargs,
        )
        if self.config.num_sinks:
            inputs.pop("position_ids", None)  # forward derives them from the mask and the cache
        return inputs

    @staticmethod
    def create_masks_for_generate(attention_mask=None, **kwargs):
        """Return the mask unchanged: `forward` extends it by the sinks."""
        return attention_mask

    def _prepare_static_cache(self, cache_implementation, batch_size, max_cache_len, *args, **kwargs):
        return super()._prepare_static_cache(
            cache_implementation, batch_size, max_cache_len + self.config.num_sinks, *args, **kwargs
        )

    def _get_logits_processor(self, *args, **kwargs):
        processors = super()._get_logits_processor(*args, **kwargs)
        if self.config.num_sinks:
            processors.append(SuppressTokensLogitsProcessor(self.config.sink_token_ids, device=self.device))
        return processors


def _length(cache: Cache | None) -> int:
    return 0 if cache is None else cache.get_seq_length()


def _shape(inputs: torch.Tensor | None, cache: Cache | None) -> tuple[int, int]:
    if inputs is None:
        raise ValueError("no input: pass input_ids or inputs_embeds")
    if inputs.ndim < 2 or inputs.shape[0] == 0:
        raise ValueError(f"the input has shape {tuple(inputs.shape)}: pass (batch, tokens) with at least one row")
    if inputs.shape[1] == 0 and _length(cache):
        raise ValueError(
            "no new tokens: with a cache, pass `generate` the full sequence, that is the tokens that are already in "
            "the cache followed by the new ones"
        )
    return inputs.shape[0], inputs.shape[1]


def _keep(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    if isinstance(logits_to_keep, int):
        return hidden_states[:, -logits_to_keep:] if logits_to_keep else hidden_states
    return hidden_states[:, logits_to_keep]


def _align(hidden_states, labels, num_sinks: int, attention_mask) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the targets' hidden states ``(B, N, D)``, and the targets ``(B, N)``."""
    num_tokens = hidden_states.shape[1] - num_sinks
    if labels.shape[1] not in (num_tokens, num_tokens + 1):
        raise ValueError(
            f"labels cover {labels.shape[1]} tokens, but the text has {num_tokens}: pass one label per token, or one "
            "more, which is the target of the last token"
        )
    targets = labels if num_sinks else labels[:, 1:]
    predictors = hidden_states[:, max(num_sinks - 1, 0) :][:, : targets.shape[1]]
    if num_sinks and attention_mask is not None:
        # In a left-padded row, the last sink predicts the first real token, not the padding.
        starts = torch.zeros_like(targets, dtype=torch.bool)
        starts.scatter_(1, attention_mask.long().argmax(dim=1, keepdim=True), True)
        predictors = torch.where(starts[..., None], predictors[:, :1], predictors)
    return predictors, targets


def _align_later(hidden_states, labels, num_sinks: int, _) -> tuple[torch.Tensor, torch.Tensor]:
    """Like `_align`, for a later segment of a sample, in which the sinks predict nothing."""
    return _align(hidden_states[:, num_sinks:], labels, 0, None)


def _cross_entropy(logits, targets, num_items_in_batch) -> torch.Tensor:
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = nn.functional.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction=reduction)
    return loss if num_items_in_batch is None else loss / num_items_in_batch


AutoConfig.register("sink_gpt_neox", SinkGPTNeoXConfig)
refuse_runs_in_auto_classes()
AutoModel.register(SinkGPTNeoXConfig, SinkGPTNeoXModel)
AutoModelForCausalLM.register(SinkGPTNeoXConfig, SinkGPTNeoXForCausalLM)
register_checkpoint_conversion_mapping(  # the head is `embed_out.weight` on disk, as in Pythia checkpoints
    "SinkGPTNeoXForCausalLM", get_checkpoint_conversion_mapping("GPTNeoXForCausalLM"), overwrite=True
)
