"""The short form of `benchmarks/cache_soak.py`."""

import pytest
import torch

from benchmarks.cache_soak import Soak, tiny_llama


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
@pytest.mark.parametrize("num_tokens", [2500, pytest.param(200_000, marks=[pytest.mark.slow, pytest.mark.long])])
def test_streams_in_one_cache_equal_streams_alone(kv_dtype, num_tokens):
    torch.manual_seed(0)
    soak = Soak(tiny_llama(), num_rows=5, longest_pass=40, sampled=1.0, ending=0.15, kv_dtype=kv_dtype)
    soak.run(1000)
    num_bytes = soak.cache.num_bytes
    soak.run(num_tokens)
    assert soak.cache.num_bytes == num_bytes
    assert soak.counts["compared"] >= num_tokens // 125
    assert soak.counts["loads"] >= 1
    assert soak.largest_difference < (1e-9 if kv_dtype is None else 0.2)
