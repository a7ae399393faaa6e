"""Runs that are equal bit for bit on a GPU (`train.deterministic`)."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

# Read when cuBLAS and NCCL are first used. With several streams, cuBLAS may choose other kernels
# unless its workspace is fixed. NVLink multicast may add in another order.
VARIABLES = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_NVLS_ENABLE": "0"}


@contextmanager
def deterministic(is_wanted: bool) -> Iterator[None]:
    """Context in which an operation is deterministic, or raises a RuntimeError that names it.

    Three things differ from run to run otherwise: the backward pass of cuDNN's attention adds in
    any order, and so does that of the embedding. torch.compile chooses kernels by their measured
    time.

    Enter it before CUDA is used.
    """
    if not is_wanted:
        yield
        return
    import torch._inductor.config as inductor

    memory: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = False  # it only makes errors visible, and takes time
    try:
        with inductor.patch(deterministic=True):
            yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        memory.fill_uninitialized_memory = before[1]
