"""`sinklm generate`: continue a prompt and print the text while it is generated."""

import os
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..console import Console
from ..text import printable
from .options import (
    Cache,
    Device,
    Dtype,
    DtypeName,
    Model,
    Quiet,
    Seed,
    Temperature,
    TopK,
    check_temperature,
    examples,
    parse_cache,
    placement,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..streaming import Generator, StreamingCache

LONG_TEXT = 1000  # number of tokens from which compiling the step on a GPU saves time


@examples(
    'sinklm generate runs/learnable-sink "Once upon a time"',
    'sinklm generate exports/learnable-sink "Once upon a time" --stream --cache 1+63 --max-new-tokens 200',
)
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads it from standard input.")],
    stream: Annotated[
        bool,
        typer.Option(
            "--stream",
            help="Generate until Ctrl-C, in constant memory. By default the cache has 1024 tokens, or one less than "
            "the trained length if that is shorter; it keeps the model's sinks, or the first 4 tokens without sinks.",
        ),
    ] = False,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Maximum number of tokens to generate.", show_default="128; no limit with --stream"),
    ] = None,
    temperature: Temperature = 0.8,
    top_k: TopK = None,
    cache: Cache = None,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = DtypeName.AUTO,
    quiet: Quiet = False,
) -> None:
    """Continue a prompt up to the end-of-text token, or with --stream without a length limit.

    With --stream or --cache, memory does not grow with the text.
    """
    shape = None if cache is None else parse_cache(cache)
    check_temperature(temperature)
    prompt = _read_prompt(prompt)
    console = Console(is_quiet=quiet)
    console.note(f"loading {model} …")
    import torch

    from ..checkpoints import load_model, load_tokenizer

    language_model, tokenizer = load_model(model, **placement(device, dtype)), load_tokenizer(model)
    ids = tokenizer(prompt, verbose=False)["input_ids"]
    if not ids:
        raise ValueError("the prompt is empty: pass at least one character")
    torch.manual_seed(seed)
    if not stream and shape is None:
        _generate_dense(language_model, tokenizer, ids, max_new_tokens or 128, temperature, top_k)
        return
    limit = max_new_tokens or (None if stream else 128)
    is_long = limit is None or limit > LONG_TEXT
    generator = make_generator(console, language_model, shape, temperature, top_k, compile=is_long)
    end_ids = set() if stream else end_of_text_ids(language_model, tokenizer)
    _print_stream(console, tokenizer, generator, prompt, ids, limit, end_ids)


def _read_prompt(prompt: str) -> str:
    import sys

    if prompt == "-" and sys.stdin is None:
        raise ValueError("standard input is closed: pass the prompt as an argument, or open standard input")
    try:
        if prompt == "-":  # as UTF-8, whatever the locale
            prompt = sys.stdin.buffer.read().decode() if hasattr(sys.stdin, "buffer") else sys.stdin.read()
        prompt = os.fsencode(prompt).decode() if _has_bytes(prompt) else prompt
    except UnicodeError as error:
        raise ValueError(f"the prompt is not valid UTF-8 ({error}): convert it to UTF-8") from error
    return prompt


def _has_bytes(argument: str) -> bool:
    """Whether an argument contains bytes that are no text in the encoding of the locale."""
    return any("\udc80" <= character <= "\udcff" for character in argument)


def show(text: str, end: str = "") -> None:
    """Print generated text. A terminal gets control characters as escapes, a file or pipe as is."""
    import sys

    is_terminal = sys.stdout is not None and sys.stdout.isatty()
    print(printable(text) if is_terminal else text, end=end, flush=True)


def make_generator(
    console: Console,
    model: "PreTrainedModel",
    shape: tuple[int, int] | None,
    temperature: float,
    top_k: int | None,
    *,
    compile: bool = True,
) -> "Generator":
    """Create a generator with an empty cache; by default of the model's default size."""
    from ..streaming import Generator, StreamingCache, default_cache

    num_kept, window = default_cache(model) if shape is None else shape
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        cache = StreamingCache.for_model(model, num_kept=num_kept, window=window)
    for warning in caught:
        console.warn(str(warning.message))
    generator = Generator(model, cache, temperature=temperature, top_k=top_k, compile=compile)
    if generator.is_compiled:
        console.note("compiling; the second token will be delayed")
    return generator


def end_of_text_ids(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    """Return the tokens at which `transformers` stops generating."""
    configured = model.generation_config.eos_token_id if model.generation_config else None
    ids = configured if isinstance(configured, list) else [configured, tokenizer.eos_token_id]
    return {token_id for token_id in ids if token_id is not None}


def _generate_dense(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompt_ids: list[int],
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
) -> None:
    import torch
    from transformers import TextStreamer

    class Shown(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            show(text, end="\n" if stream_end else "")

    from ..models.checked import checked_passes
    from ..streaming.families import num_embedded_positions
    from ..streaming.generation import MIN_TEMPERATURE

    num_positions = num_embedded_positions(model.config)
    if num_positions and len(prompt_ids) + max_new_tokens > num_positions:
        raise ValueError(
            f"the prompt has {len(prompt_ids)} tokens; {max_new_tokens} new tokens exceed the {num_positions} "
            "positions of this model: lower --max-new-tokens or shorten the prompt"
        )
    ids = torch.tensor([prompt_ids], device=model.device)
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": max(temperature, MIN_TEMPERATURE), "top_k": top_k or 0}
    with checked_passes(model):
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            pad_token_id=min(end_of_text_ids(model, tokenizer), default=None),
            streamer=Shown(tokenizer, skip_special_tokens=True),
            trust_remote_code=False,
            **sampling,
        )


def _print_stream(
    console: Console,
    tokenizer: "PreTrainedTokenizerBase",
    generator: "Generator",
    prompt: str,
    prompt_ids: list[int],
    max_new_tokens: int | None,
    end_ids: set[int],
) -> None:
    """Print the text to stdout and the speed to stderr."""
    from itertools import islice, takewhile

    from ..streaming import TextStream

    speed = Speed()
    text = TextStream(tokenizer)
    show(prompt)
    try:
        tokens = takewhile(lambda token: token not in end_ids, generator(prompt_ids))
        for token in speed.count(islice(tokens, max_new_tokens)):
            show(text.push(token))
    except KeyboardInterrupt:
        pass
    show(text.flush(), end="\n")
    console.note(f"{speed}; {describe_cache(generator.cache)}")


class Speed:
    """Counts tokens and their time; the first tokens, which compile on a GPU, are not timed."""

    num_untimed = 4

    def __init__(self) -> None:
        self.num_tokens, self.started, self.ended = 0, 0.0, 0.0

    def count(self, tokens: Iterator[int]) -> Iterator[int]:
        import time

        for token in tokens:
            self.ended = time.perf_counter()
            if self.num_tokens < self.num_untimed:
                self.started = self.ended
            self.num_tokens += 1
            yield token

    def __str__(self) -> str:
        seconds = self.ended - self.started
        rate = f", {(self.num_tokens - self.num_untimed) / seconds:,.1f} tokens/s" if seconds > 0 else ""
        return f"{self.num_tokens:,} tokens{rate}"


def describe_cache(cache: "StreamingCache") -> str:
    shape = cache.shape
    return f"cache {shape.num_kept}+{shape.window}, {cache.num_bytes / 1e6:,.1f} MB"
