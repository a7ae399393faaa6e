"""Attention sinks of causal LMs: sink rates, maps, norms and massive activations.

Modules, in reading order: `sequences` (the input), `observation` (the states of each layer in a
forward pass), `statistics` (definitions, and means over sequences), `tables` (JSON and tables),
`plots`.
"""

from .observation import Layer, observe
from .sequences import Sequences, sequences_of_store, sequences_of_texts
from .statistics import Statistics, measure

__all__ = ["Layer", "Sequences", "Statistics", "measure", "observe", "sequences_of_store", "sequences_of_texts"]
