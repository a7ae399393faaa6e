"""Errors of the command as a whole."""

import errno
import os

import pytest
import torch

from sinklm.cli import main as module


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("no such key"), "error: no such key"),
        (ValueError("rank 0 is out of memory: lower it"), "error: rank 0 is out of memory: lower it"),
        (torch.OutOfMemoryError("CUDA out of memory"), "error: out of memory; .*: CUDA out of memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), "error: out of memory; .*_ALLOC_FAILED"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "error: out of memory; .* can't allocate memory"),
        (MemoryError("Unable to allocate 8 TiB"), "error: out of memory; .* 8 TiB"),
        *(
            (OSError(number, os.strerror(number)), f"error: cannot write to .*: {os.strerror(number)}; free space .*")
            for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        ),
    ],
)
def test_an_error_of_the_user_is_one_line(monkeypatch, error, line):
    monkeypatch.setattr(module, "_invoke", raising(error))
    with pytest.raises(SystemExit, match=f"^{line}$"):
        module.main()
    monkeypatch.setenv("SINKLM_DEBUG", "1")
    with pytest.raises(type(error)):
        module.main()


def test_a_bug_shows_its_traceback(monkeypatch):
    monkeypatch.setattr(module, "_invoke", raising(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        module.main()


def raising(error: Exception):
    def app():
        raise error

    return app
