"""`sinklm generate`: continue a prompt and print the text while it is generated."""

import math
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..text import printable

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..streaming import Generator, StreamingCache

Model = Annotated[
    str,
    typer.Argument(help="Training run, checkpoint, transformers folder, or name on the Hugging Face Hub."),
]
Temperature = Annotated[
    float, typer.Option(min=0.0, help="Sampling temperature; 0 always chooses the most likely token.")
]
TopK = Annotated[
    int | None, typer.Option(min=1, help="Sample from the K most likely tokens; default: from all tokens.")
]
NumKept = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Number of initial tokens that stay in the cache, including sinks; requires --window.",
        show_default=False,
    ),
]
Window = Annotated[
    int | None,
    typer.Option(
        min=1, help="Number of recent tokens that stay in the cache; requires --num-kept.", show_default=False
    ),
]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Random seed for sampling.")]

LONG_TEXT = 1000  # number of tokens from which compiling the step on a GPU saves time


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
    num_kept: NumKept = None,
    window: Window = None,
    seed: Seed = 0,
) -> None:
    """Continue a prompt up to the end-of-text token, or with --stream without a length limit.

    With --stream, or with --num-kept and --window, memory does not grow with the text.
    """
    import torch

    from ..checkpoints import load_model, load_tokenizer

    check_cache_options(num_kept, window)
    check_temperature(temperature)
    prompt = _read_prompt(prompt)
    language_model, tokenizer = load_model(model), load_tokenizer(model)
    ids = tokenizer(prompt, verbose=False)["input_ids"]
    if not ids:
        raise ValueError("the prompt is empty: pass at least one character")
    torch.manual_seed(seed)
    if not stream and num_kept is None:
        _generate_dense(language_model, tokenizer, ids, max_new_tokens or 128, temperature, top_k)
        return
    limit = max_new_tokens or (None if stream else 128)
    is_long = limit is None or limit > LONG_TEXT
    generator = make_generator(language_model, num_kept, window, temperature, top_k, compile=is_long)
    end_ids = set() if stream else end_of_text_ids(language_model, tokenizer)
    _print_stream(tokenizer, generator, prompt, ids, limit, end_ids)


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


def check_cache_options(num_kept: int | None, window: int | None) -> None:
    if (num_kept is None) != (window is None):
        raise ValueError("--num-kept and --window must be used together: pass both or neither")


def check_temperature(temperature: float) -> None:
    if not math.isfinite(temperature):
        raise ValueError(f"--temperature is {temperature}: it must be a finite number of at least 0")


def make_generator(
    model: "PreTrainedModel",
    num_kept: int | None,
    window: int | None,
    temperature: float,
    top_k: int | None,
    *,
    compile: bool = True,
) -> "Generator":
    """Create a generator with an empty cache; by default of the model's default size."""
    from ..streaming import Generator, StreamingCache, default_cache

    if num_kept is None or window is None:
        num_kept, window = default_cache(model)
    cache = StreamingCache.for_model(model, num_kept=num_kept, window=window)
    trained_length = getattr(model.config, "max_position_embeddings", None)
    if trained_length and num_kept + window >= trained_length:
        typer.echo(
            f"Warning: the cache {num_kept}+{window} is too large for the {trained_length} positions that the model "
            f"was trained on; output quality may degrade. Use --num-kept + --window < {trained_length}.",
            err=True,
        )
    generator = Generator(model, cache, temperature=temperature, top_k=top_k, compile=compile)
    if generator.is_compiled:
        typer.echo("Compiling; the second token will be delayed.", err=True)
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
    typer.echo(f"{speed}; {describe_cache(generator.cache)}", err=True)


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
