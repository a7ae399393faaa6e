"""From text to training samples: readers, tokenization, the token store, windows, sample order."""

from ..extras import require_extra

require_extra("data")

from .inputs import find_inputs
from .megatron import MegatronReader, MegatronWriter
from .megatron_order import MegatronOrderStore
from .mixture import SetWindows, WeightedOrder
from .order import SampleOrder, batch_indices
from .prepare import prepare_store
from .preshuffled import PreshuffledStore, open_store
from .store import TokenStore
from .windows import TokenWindows

__all__ = [
    "MegatronOrderStore",
    "MegatronReader",
    "MegatronWriter",
    "PreshuffledStore",
    "SampleOrder",
    "SetWindows",
    "TokenStore",
    "TokenWindows",
    "WeightedOrder",
    "batch_indices",
    "find_inputs",
    "open_store",
    "prepare_store",
]
