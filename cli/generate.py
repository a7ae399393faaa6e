"""`sinklm generate`: a prompt goes in, its continuation comes out as it is made."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..streaming import Generator, StreamingCache

Model = Annotated[str, typer.Argument(help="Run folder, checkpoint, transformers folder, or name on the Hub.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token each time.")]
TopK = Annotated[int | None, typer.Option(min=1, help="Sample among so many of the likeliest tokens; else among all.")]
NumKept = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Tokens that the cache keeps from the start, sinks included; goes with --window.",
        show_default=False,
    ),
]
Window = Annotated[
    int | None,
    typer.Option(min=1, help="Recent tokens that the cache keeps; goes with --num-kept.", show_default=False),
]
Seed = Annotated[int, typer.Option(help="Of the sampling.")]

LONG_TEXT = 1000  # tokens, from which compiling a step on a GPU pays


def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="The text to continue; - reads it from standard input.")],
    stream: Annotated[
        bool,
        typer.Option(
            "--stream",
            help="Write until Ctrl-C. Unless --num-kept and --window say otherwise, the cache keeps 4 tokens, or the "
            "model's sinks, and 1024 in all, or one less than it was trained on.",
        ),
    ] = False,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens to generate.", show_default="128; no end with --stream")
    ] = None,
    temperature: Temperature = 0.8,
    top_k: TopK = None,
    num_kept: NumKept = None,
    window: Window = None,
    seed: Seed = 0,
) -> None:
    """Continue a prompt, up to the end-of-text token, or with --stream for ever.

    With --stream, or with --num-kept and --window, memory does not grow with the text.
    """
    import torch

    from ..checkpoints import load_model, load_tokenizer

    check_cache_options(num_kept, window)
    prompt = _read_prompt(prompt)
    language_model, tokenizer = load_model(model), load_tokenizer(model)
    ids = tokenizer(prompt, verbose=False)["input_ids"]
    if not ids:
        raise ValueError("the prompt is empty: give at least one character")
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

    try:
        prompt = sys.stdin.read() if prompt == "-" else prompt
        prompt.encode()  # an argument of the command line can be anything
    except UnicodeError as error:
        raise ValueError(f"the prompt is not UTF-8: {error}") from error
    return prompt


def check_cache_options(num_kept: int | None, window: int | None) -> None:
    if (num_kept is None) != (window is None):
        raise ValueError("--num-kept and --window go together: give both or neither")


def make_generator(
    model: "PreTrainedModel",
    num_kept: int | None,
    window: int | None,
    temperature: float,
    top_k: int | None,
    *,
    compile: bool = True,
) -> "Generator":
    """With an empty cache of the size asked for, or the model's default."""
    from ..streaming import Generator, StreamingCache, default_cache

    if num_kept is None or window is None:
        num_kept, window = default_cache(model)
    cache = StreamingCache.for_model(model, num_kept=num_kept, window=window)
    trained_length = getattr(model.config, "max_position_embeddings", None)
    if trained_length and num_kept + window >= trained_length:
        typer.echo(
            f"The cache {num_kept}+{window} does not fit into the {trained_length} positions that the model was "
            "trained on: its text may fall apart.",
            err=True,
        )
    generator = Generator(model, cache, temperature=temperature, top_k=top_k, compile=compile)
    if generator.is_compiled:
        typer.echo("The second token waits until its step is compiled.", err=True)
    return generator


def end_of_text_ids(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    """Tokens after which `transformers` stops generating."""
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
    from transformers import LogitsProcessorList, TextStreamer

    from ..streaming.families import num_embedded_positions
    from ..streaming.generation import MIN_TEMPERATURE
    from ..streaming.scoring import refuse_nan

    num_positions = num_embedded_positions(model.config)
    if num_positions and len(prompt_ids) + max_new_tokens > num_positions:
        raise ValueError(
            f"the prompt's {len(prompt_ids)} tokens and {max_new_tokens} more are beyond the {num_positions} positions "
            "that this model has: lower --max-new-tokens"
        )
    ids = torch.tensor([prompt_ids], device=model.device)
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": max(temperature, MIN_TEMPERATURE), "top_k": top_k or 0}
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        pad_token_id=min(end_of_text_ids(model, tokenizer), default=None),
        logits_processor=LogitsProcessorList([lambda _, logits: refuse_nan(logits)]),
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
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
    """Write the text to stdout, and the speed to stderr where it is not part of the text."""
    from itertools import islice, takewhile

    from ..streaming import TextStream

    speed = Speed()
    text = TextStream(tokenizer)
    print(prompt, end="", flush=True)
    try:
        tokens = takewhile(lambda token: token not in end_ids, generator(prompt_ids))
        for token in speed.count(islice(tokens, max_new_tokens)):
            print(text.push(token), end="", flush=True)
    except KeyboardInterrupt:
        pass
    print(text.flush(), flush=True)
    typer.echo(f"{speed}; {describe_cache(generator.cache)}", err=True)


class Speed:
    """Counts tokens as they pass, and the seconds they take; the first few, which compile on a GPU, are not timed."""

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
