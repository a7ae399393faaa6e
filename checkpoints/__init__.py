"""Folders of runs and checkpoints: their layout, loading, export and model cards."""

from .loading import load_model, load_tokenizer

__all__ = ["load_model", "load_tokenizer"]
