"""`sinklm generate`: a prompt goes in, its continuation comes out as it is made."""

from typing import Annotated

import typer


def generate(
    model: Annotated[str, typer.Argument(help="Run folder, checkpoint, transformers folder, or name on the Hub.")],
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token each time.")] = 0.8,
    num_kept: Annotated[
        int | None, typer.Option(min=0, help="Stream: tokens kept from the start, sinks included.")
    ] = None,
    window: Annotated[int | None, typer.Option(min=1, help="Stream: recent tokens kept.")] = None,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
) -> None:
    """Continue a prompt; with --num-kept and --window in constant memory."""
    import torch
    from transformers import TextStreamer

    from ..models import StreamingCache, load_model, load_tokenizer

    if (num_kept is None) != (window is None):
        raise ValueError("--num-kept and --window go together: give both or neither")
    language_model, tokenizer = load_model(model), load_tokenizer(model)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(language_model.device)
    if ids.shape[1] == 0:
        raise ValueError("the prompt is empty: give at least one character")
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    cache = {}
    if num_kept is not None and window is not None:
        cache["past_key_values"] = StreamingCache.for_model(language_model, num_kept=num_kept, window=window)
    torch.manual_seed(seed)
    language_model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        pad_token_id=language_model.config.eos_token_id,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        **sampling,
        **cache,
    )
