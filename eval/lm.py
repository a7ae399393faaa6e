"""lm-eval's interface to models: `SinkLM` for those of sinklm and their exports."""

import inspect
import os
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import simple_parse_args_string
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..models import SinkGPTNeoXConfig
from ..models.checked import check_ids, refuse_nonfinite_logits
from ..models.config import sink_config
from ..streaming.families import num_embedded_positions

CPU_BATCH = 8  # larger batches are not faster there
# Arguments of HFLM that have an effect on a model that is loaded already.
LM_ARGUMENTS = (
    "add_bos_token",
    "chat_template_args",
    "enable_thinking",
    "logits_cache",
    "max_batch_size",
    "mixed_precision_dtype",
    "prefix_token_id",
    "softmax_dtype",
    "think_end_token",
    "truncation",
)
FLOAT_TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class CheckedLM(HFLM):
    """lm-eval's model, with errors in place of its assertions for requests that are too long."""

    num_sinks = 0  # positions that ``max_length`` does not count

    def _loglikelihood_tokens(self, requests: list[Any], *arguments: Any, **options: Any) -> Any:
        longest = max((len(answer) for _, _, answer in requests), default=0)
        if longest > self.max_length:
            raise ValueError(
                f"an answer has {longest} tokens, but a request has room for {self.max_length} and "
                f"{self.num_sinks} sink tokens: set --max-length to at least {longest + self.num_sinks}"
            )
        return super()._loglikelihood_tokens(requests, *arguments, **options)

    def generate_until(self, requests: list[Any], *arguments: Any, **options: Any) -> Any:
        try:
            return super().generate_until(requests, *arguments, **options)
        except AssertionError as error:
            if "max tokens to generate" not in str(error):
                raise
            raise ValueError(f"{error} Raise --max-length") from error


class SinkLM(CheckedLM):
    """Scores texts after a model's sink tokens, for a model of sinklm and for its export.

    lm-eval sees texts without sinks, so truncation and rolling windows never remove or score them.
    A request without context is scored after the sinks alone. lm-eval marks it by
    ``prefix_token_id`` in front; here this is the last sink.
    """

    def __init__(self, model: PreTrainedModel, sink_ids: list[int], **options: Any):
        self.sink_ids, self.num_sinks = sink_ids, len(sink_ids)
        self.is_export = not isinstance(model.config, SinkGPTNeoXConfig)  # its tokenizer adds the sinks
        super().__init__(pretrained=model, prefix_token_id=sink_ids[-1], **options)
        # A chat template of an export may write the sinks into the text.
        self.sink_text = "".join(self.tokenizer.convert_ids_to_tokens(sink_ids)) if self.is_export else ""

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        return super().tok_encode(string.removeprefix(self.sink_text), add_special_tokens=False, **options)

    def tok_batch_encode(
        self, strings: list[str], padding_side: str = "left", left_truncate_len: int | None = None, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode prompts ``(B, T)``; those for an export start with the sinks, after padding."""
        self.add_bos_token = False
        texts = [string.removeprefix(self.sink_text) for string in strings]
        ids, mask = super().tok_batch_encode(texts, padding_side, left_truncate_len, **options)
        if not self.is_export:
            return ids, mask
        rows = []
        for row, is_token in zip(ids, mask.bool(), strict=True):
            rows.append(torch.cat([row[~is_token], torch.tensor(self.sink_ids), row[is_token]]))
        return torch.stack(rows), torch.cat([mask, mask.new_ones(len(ids), len(self.sink_ids))], dim=1).sort(dim=1)[0]

    def _model_call(self, inps: torch.Tensor, attn_mask: Any = None, labels: Any = None) -> torch.Tensor:
        """Return logits ``(B, T, V)`` of ids ``(B, T)``; a row may begin with the last sink."""
        num_sinks = len(self.sink_ids)
        sinks = torch.tensor(self.sink_ids, device=inps.device).expand(len(inps), -1)
        has_no_context = inps[:, 0] == self.sink_ids[-1]
        text = torch.where(has_no_context[:, None], torch.cat([inps[:, 1:], inps[:, :1] * 0], dim=1), inps)
        check_ids(text, self.model)
        with (
            torch.no_grad(),
            torch.autocast(
                self.device.type, dtype=self.mixed_precision_dtype, enabled=self.mixed_precision_dtype is not None
            ),
        ):
            hidden = self.model.get_decoder()(torch.cat([sinks, text], dim=1)).last_hidden_state  # (B, S + T, D)
            first = num_sinks - has_no_context.long()
            places = first[:, None] + torch.arange(inps.shape[1], device=inps.device)  # (B, T)
            chosen = hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[-1]))
            return refuse_nonfinite_logits(self.model.get_output_embeddings()(chosen))


def as_lm(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int | str = "auto",
    max_length: int | None = None,
    **options: Any,
) -> HFLM:
    """Wrap a model for lm-eval. Requests are truncated to ``max_length``, sink tokens included.

    In a process of ``accelerate launch`` or ``torchrun``, it takes its share of the requests.

    Args:
        batch_size: requests per batch. ``"auto"`` finds the largest that fits the memory of a GPU;
            on a CPU it is 8. Both are at most the option ``max_batch_size``.
        max_length: positions of a request; None: the trained length. lm-eval truncates contexts
            only: an answer longer than this raises a ValueError.
        options: those of lm-eval's ``HFLM`` in `LM_ARGUMENTS`.

    Raises:
        ValueError: an option is unknown, has a wrong value or no effect here, the model has too few
            positions for ``max_length``, or the tokenizer has no token to put before a text.
    """
    _check_options(options)
    sink_ids = sink_config(model.config).sink_token_ids
    num_positions: Any = max_length or getattr(model.config, "max_position_embeddings", None)
    if batch_size != "auto" and "max_batch_size" in options:
        raise ValueError(f"--model-args: max_batch_size has no effect with --batch-size {batch_size}: leave out one")
    if max_length and (limit := num_embedded_positions(model.config)) and max_length > limit:
        raise ValueError(f"--max-length is {max_length}, but the model has only {limit} positions: lower it")
    if batch_size == "auto" and model.device.type == "cpu":
        batch_size = min(CPU_BATCH, options.get("max_batch_size", CPU_BATCH))
    common: dict[str, Any] = {"tokenizer": tokenizer, "batch_size": batch_size, "trust_remote_code": False}
    if sink_ids:
        num_sinks = len(sink_ids)
        if num_positions < num_sinks + 2:
            raise ValueError(
                f"--max-length is {num_positions}: with the model's {num_sinks} sink tokens, it must be at least "
                f"{num_sinks + 2}"
            )
        if {"add_bos_token", "prefix_token_id"} & set(options):
            raise ValueError(
                "--model-args: add_bos_token and prefix_token_id have no effect on a model with sink tokens"
            )
        lm = SinkLM(model, sink_ids, max_length=num_positions - num_sinks, **common, **options)
    elif isinstance(model.config, SinkGPTNeoXConfig):
        ours = {"add_bos_token": False, "prefix_token_id": model.config.eos_token_id}
        lm = CheckedLM(pretrained=model, max_length=num_positions, **common, **(ours | options))
    else:
        if tokenizer.bos_token_id is tokenizer.eos_token_id is None:
            raise ValueError(
                "the tokenizer has no begin-of-text and no end-of-text token, one of which stands before each text: "
                'set "eos_token" in tokenizer_config.json'
            )
        lm = CheckedLM(pretrained=model, max_length=num_positions, **common, **options)
    _join_processes(lm)
    return lm


def parse_options(text: str | None) -> dict[str, Any]:
    """Parse ``"softmax_dtype=float32,logits_cache=False"`` as lm-eval does.

    Raises:
        ValueError: the text is not ``KEY=VALUE,…``, or an option is unknown or has no effect.
    """
    if not text:
        return {}
    if not all("=" in part for part in text.split(",")):
        raise ValueError(f"--model-args is {text[:80]!r}: write KEY=VALUE, separated by commas")
    names = [part.partition("=")[0] for part in text.split(",")]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"--model-args has {twice[0]} twice: keep one")
    options = simple_parse_args_string(text)
    _check_options(options)
    return options


def num_processes() -> int:
    """Number of processes of ``accelerate launch`` or ``torchrun``."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def own_device(device: str | None) -> str | None:
    """Return the device of this process: of several, each has a GPU of its own.

    Raises:
        ValueError: ``device`` is one GPU, and there are several processes.
    """
    if num_processes() == 1 or device not in (None, "cuda") or not torch.cuda.is_available():
        if num_processes() > 1 and device is not None and ":" in device:
            raise ValueError(f"--device {device} would be shared by {num_processes()} processes: leave it out")
        return device
    return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"


def _join_processes(lm: HFLM) -> None:
    """Let lm-eval share the requests; it does so by itself only if it loads the model."""
    if num_processes() == 1:
        return
    timeout = InitProcessGroupKwargs(timeout=timedelta(days=7))  # the first process aggregates alone
    lm.accelerator = Accelerator(kwargs_handlers=[timeout], cpu=lm.device.type == "cpu")
    lm._rank, lm._world_size = lm.accelerator.process_index, lm.accelerator.num_processes


def _check_options(options: dict[str, Any]) -> None:
    known = set(inspect.signature(HFLM.__init__).parameters)
    for name, value in options.items():
        if name == "dtype":
            raise ValueError("--model-args: use --dtype for the data type of the weights")
        if name not in LM_ARGUMENTS:
            reason = "has no effect on a model that is loaded already" if name in known else "is unknown"
            raise ValueError(f"--model-args: {name} {reason}: use only {', '.join(LM_ARGUMENTS)}")
        if expected := _expected(name, value):
            raise ValueError(f"--model-args: {name} is {str(value)[:40]!r}: it must be {expected}")


def _expected(name: str, value: Any) -> str:
    """Return what an option must be, empty if it is."""
    if name.endswith("_dtype"):
        dtype = getattr(torch, value, None) if isinstance(value, str) else value
        return "" if value is None or dtype in FLOAT_TYPES else "float32, float64, bfloat16 or float16"
    if name in ("max_batch_size", "prefix_token_id"):
        smallest = 1 if name == "max_batch_size" else 0
        return "" if type(value) is int and value >= smallest else f"a number of at least {smallest}"
    if name in ("add_bos_token", "enable_thinking", "logits_cache", "truncation"):
        return "" if value in (True, False, None) else "True or False"
    return ""
