"""Where surplus attention goes: sink rates, attention maps, norms and massive activations of any causal LM.

Read in this order: `sequences` (what is read), `observation` (what a forward pass shows of each layer), `statistics`
(the definitions, and their means over sequences), `report` (JSON and tables), `plots`.
"""

from .observation import Layer, observe
from .sequences import Sequences, sequences_of_store, sequences_of_texts
from .statistics import Statistics, measure

__all__ = ["Layer", "Sequences", "Statistics", "measure", "observe", "sequences_of_store", "sequences_of_texts"]
