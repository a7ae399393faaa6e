"""`sinklm generate`: continue a prompt and print the text while it is generated."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..console import Console
from ..text import printable
from .options import (
    CACHE_HELP,
    CACHE_METAVAR,
    DEFAULT_CACHE,
    MAX_NEW_TOKENS_HELP,
    MOST_NEW_TOKENS,
    Device,
    Dtype,
    DtypeName,
    Memory,
    MemorySize,
    MinP,
    Model,
    Quiet,
    RepetitionPenalty,
    Seed,
    Temperature,
    TopK,
    TopP,
    check_memory,
    check_sampling,
    examples,
    memory_options,
    note_windows,
    parse_cache,
    parse_memory,
    placement,
)
from .prompts import read_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..streaming import Generator, StreamingCache
    from ..streaming.sampling import Sampling

DEFAULT_NEW_TOKENS = 128
LONG_TEXT = 1000  # number of tokens from which compiling the step on a GPU saves time


@dataclass(frozen=True)
class Continuation:
    """A prompt and its continuation; `--json` prints this."""

    prompt: str
    text: str
    num_tokens: int  # without that of the end
    finish_reason: str  # stop: end of text; length: the maximum; interrupted: Ctrl-C


@examples(
    'sinklm generate runs/quickstart "Once upon a time"',
    'sinklm generate exports/quickstart "Once upon a time" --stream --cache 1+63 --max-new-tokens 200',
    "sinklm generate runs/quickstart --prompts-file prompts.txt --top-p 0.9 --json",
)
def generate(
    model: Model,
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="PROMPT", help="Texts to continue; - reads one from standard input."),
    ] = None,
    prompts_file: Annotated[
        Path | None,
        typer.Option(
            help="File with a prompt in each line; in a .jsonl file, each line is a JSON text or has the key prompt.",
            show_default=False,
        ),
    ] = None,
    stream: Annotated[
        bool,
        typer.Option(
            "--stream",
            help="Generate until Ctrl-C in a streaming cache (--cache), so that memory stays constant.",
        ),
    ] = False,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, max=MOST_NEW_TOKENS, help=MAX_NEW_TOKENS_HELP, show_default="128; no limit with --stream"),
    ] = None,
    temperature: Temperature = 0.8,
    top_k: TopK = None,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    cache: Annotated[
        str | None,
        typer.Option(
            metavar=CACHE_METAVAR, help=CACHE_HELP, show_default=f"none; with --stream or --memory: {DEFAULT_CACHE}"
        ),
    ] = None,
    memory: Memory = None,
    seed: Seed = 0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a line of JSON for each prompt, when its text is complete.")
    ] = False,
    device: Device = None,
    dtype: Dtype = DtypeName.AUTO,
    quiet: Quiet = False,
) -> None:
    """Continue prompts up to the end-of-text token, or with --stream without a length limit.

    Each prompt is continued separately and with the same seed, so that its text does not depend on
    the others. With --stream, --cache or --memory, device memory does not grow with the text.
    """
    shape, size = None if cache is None else parse_cache(cache), parse_memory(memory)
    check_memory(size, [] if shape is None else [shape])
    check_sampling(temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    texts = read_prompts(prompts or [], prompts_file)
    if stream and max_new_tokens is None and len(texts) > 1:
        raise ValueError(f"--stream never ends the first of {len(texts)} prompts: set --max-new-tokens")
    console = Console(is_quiet=quiet)
    console.note(f"loading {model} …")
    import torch

    from ..checkpoints import load_model, load_tokenizer
    from ..streaming.sampling import Sampling

    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    language_model, tokenizer = load_model(model, **placement(device, dtype)), load_tokenizer(model)
    encoded = [_encode(tokenizer, text) for text in texts]
    is_stream = stream or shape is not None or size is not None
    note_windows(console, language_model, model, has_cache=is_stream)
    limit = max_new_tokens or (None if stream else DEFAULT_NEW_TOKENS)
    generator = None
    if is_stream:
        is_long = limit is None or limit * len(texts) > LONG_TEXT
        generator = make_generator(console, language_model, shape, size, sampling, compile=is_long)
    end_ids = set() if stream else end_of_text_ids(language_model, tokenizer)
    write = _nothing if as_json else show
    for i, (text, ids) in enumerate(zip(texts, encoded, strict=True)):
        torch.manual_seed(seed)
        write("\n" * bool(i))
        if generator is None:
            done = _continue_dense(console, language_model, tokenizer, text, ids, limit or 0, sampling, end_ids, write)
        else:
            generator.reset()
            done = _continue_stream(console, tokenizer, generator, text, ids, limit, end_ids, write)
        if as_json:
            print(json.dumps(asdict(done), ensure_ascii=False), flush=True)
        if done.finish_reason == "interrupted":
            break


def _encode(tokenizer: "PreTrainedTokenizerBase", prompt: str) -> list[int]:
    ids = tokenizer(prompt, verbose=False)["input_ids"]
    if not ids:
        raise ValueError("the prompt is empty: pass at least one character")
    return ids


def _nothing(text: str, end: str = "") -> None:
    pass


def show(text: str, end: str = "") -> None:
    """Print generated text. A terminal gets control characters as escapes, a file or pipe as is."""
    import sys

    is_terminal = sys.stdout is not None and sys.stdout.isatty()
    print(printable(text) if is_terminal else text, end=end, flush=True)


def make_generator(
    console: Console,
    model: "PreTrainedModel",
    shape: tuple[int, int] | None,
    memory: MemorySize | None,
    sampling: "Sampling",
    *,
    compile: bool = True,
) -> "Generator":
    """Create a generator with an empty cache; by default of the model's default size.

    Args:
        memory: as of `parse_memory`.
    """
    from ..streaming import Generator, StreamingCache, default_cache

    num_kept, window = shape or default_cache(model, block_size=memory.block_size if memory else 0)
    cache = StreamingCache.for_model(model, num_kept=num_kept, window=window, memory=memory_options(memory))
    generator = Generator(model, cache, compile=compile, **asdict(sampling))
    if generator.is_compiled:
        console.note("compiling; the second token will be delayed")
    return generator


def end_of_text_ids(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    """Return the tokens at which `transformers` stops generating."""
    configured = model.generation_config.eos_token_id if model.generation_config else None
    ids = configured if isinstance(configured, list) else [configured, tokenizer.eos_token_id]
    return {token_id for token_id in ids if token_id is not None}


def _continue_dense(
    console: Console,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompt: str,
    prompt_ids: list[int],
    max_new_tokens: int,
    sampling: "Sampling",
    end_ids: set[int],
    write: Callable[..., None],
) -> Continuation:
    """Continue a prompt with dense attention, in a cache that grows."""
    import torch
    from transformers import TextStreamer

    from ..checkpoints.loading import only_errors
    from ..models.checked import checked_passes
    from ..streaming.families import num_embedded_positions

    class Shown(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            write(text, end="\n" if stream_end else "")

    num_positions = num_embedded_positions(model.config)
    if num_positions and len(prompt_ids) + max_new_tokens > num_positions:
        raise ValueError(
            f"the prompt has {len(prompt_ids)} tokens; {max_new_tokens} new tokens exceed the {num_positions} "
            "positions of this model: lower --max-new-tokens or shorten the prompt"
        )
    trained_length = getattr(model.config, "max_position_embeddings", None)
    if trained_length and len(prompt_ids) + max_new_tokens > trained_length:
        console.warn(
            f"the prompt has {len(prompt_ids):,} tokens, and with {max_new_tokens:,} new ones it is longer than the "
            f"{trained_length:,} that the model was trained on, where text gets worse: use --stream --max-new-tokens "
            f"{max_new_tokens}"
        )
    ids = torch.tensor([prompt_ids], device=model.device)
    with checked_passes(model), only_errors():
        written = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            pad_token_id=min(end_ids, default=None),
            streamer=Shown(tokenizer, skip_special_tokens=True),
            trust_remote_code=False,
            **sampling.generate_arguments(),
        )[0].tolist()
    whole, read = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (written, prompt_ids))
    is_complete = written[-1] in end_ids
    num_tokens = len(written) - len(prompt_ids) - is_complete
    return Continuation(prompt, whole.removeprefix(read), num_tokens, "stop" if is_complete else "length")


def _continue_stream(
    console: Console,
    tokenizer: "PreTrainedTokenizerBase",
    generator: "Generator",
    prompt: str,
    prompt_ids: list[int],
    max_new_tokens: int | None,
    end_ids: set[int],
    write: Callable[..., None],
) -> Continuation:
    """Continue a prompt in a streaming cache, and print the speed to stderr."""
    from itertools import islice, takewhile

    from ..streaming import TextStream

    speed, text = Speed(), TextStream(tokenizer)
    pieces = []
    write(prompt)
    try:
        tokens = takewhile(lambda token: token not in end_ids, generator(prompt_ids))
        for token in speed.count(islice(tokens, max_new_tokens)):
            pieces.append(text.push(token))
            write(pieces[-1])
        reason = "stop" if end_ids.intersection(generator.unread) else "length"
    except KeyboardInterrupt:
        reason = "interrupted"
    pieces.append(text.flush())
    write(pieces[-1], end="\n")
    console.note(f"{speed}; {describe_cache(generator.cache)}")
    return Continuation(prompt, "".join(pieces), speed.num_tokens, reason)


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
    found = f"cache {cache.plan}, {cache.num_bytes / 1e6:,.1f} MB"
    if cache.memory is None:
        return found
    return f"{found}; memory {cache.memory.options}, {cache.num_host_bytes / 1e6:,.1f} MB in host memory"
