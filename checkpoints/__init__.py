"""Folders of runs and checkpoints: what lies in them, loading, export, and the model card of an export."""

from .loading import load_model, load_tokenizer

__all__ = ["load_model", "load_tokenizer"]
