"""What a user is told when torch.compile or Triton cannot compile."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._inductor import config
from torch._inductor.utils import fresh_cache

from sinklm.compilers import compile_failure

INSTALL = "torch.compile and Triton found no C or C++ compiler: install gcc and g++, or set CC and CXX"


def failing_compiler(path: Path, output: str) -> str:
    """Write a C++ compiler that fails where it makes a library, as Triton's C compiler may do."""
    path.write_text(f'#!/bin/sh\ncase " $* " in *" -shared "*) echo "{output}" >&2; exit 1;; esac\nexec g++ "$@"\n')
    path.chmod(0o755)
    return str(path)


def error_of(compiler: str) -> BaseException:
    """Return the error of torch.compile with this C++ compiler."""
    torch._dynamo.reset()
    with fresh_cache(), config.patch({"cpp.cxx": (None, compiler)}), pytest.raises(RuntimeError) as caught:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8))
    torch._dynamo.reset()
    return caught.value


def test_a_missing_compiler_is_named():
    assert compile_failure(error_of("/nonexistent/g++")) == INSTALL


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("a bug", "CppCompileError: C++ compile error"),
        ("main.cpp:1:10: fatal error: omp.h: No such file", "main.cpp:1:10: fatal error: omp.h: No such file"),
    ],
)
def test_a_failing_compiler_is_one_line_with_the_way_to_the_whole_error(tmp_path, output, reason):
    found = compile_failure(error_of(failing_compiler(tmp_path / "g++", output)))
    assert found == f"torch.compile failed ({reason}): SINKLM_DEBUG=1 shows the whole error"


def test_an_error_of_another_backend_is_named():
    def backend(graph, inputs):
        raise TypeError("a bug\nin two lines")

    with pytest.raises(RuntimeError) as caught:
        torch.compile(lambda x: x + 1, backend=backend)(torch.ones(8))
    assert (
        compile_failure(caught.value) == "torch.compile failed (TypeError: a bug): SINKLM_DEBUG=1 shows the whole error"
    )


@pytest.mark.parametrize("language", ["C", "C++"])
def test_triton_without_a_compiler_is_told_also_within_other_errors(language):
    inner = RuntimeError(
        f"Failed to find {language} compiler. Please specify via CC environment variable or set triton"
    )
    outer = RuntimeError("a kernel")
    outer.__cause__ = inner
    assert compile_failure(inner) == compile_failure(outer) == INSTALL


def test_a_failing_compiler_of_triton_is_told(tmp_path):
    command = [sys.executable, "-c", "raise SystemExit(1)", "-shared"]  # as triton/runtime/build.py calls gcc
    with pytest.raises(subprocess.CalledProcessError) as caught:
        subprocess.check_call(command, stdout=subprocess.DEVNULL)
    assert "install Python's headers (python3-dev)" in compile_failure(caught.value)


def test_other_errors_are_none():
    failed = subprocess.CalledProcessError(1, ["git", "describe"])
    assert [compile_failure(error) for error in (ValueError("compiler"), failed, KeyboardInterrupt())] == [None] * 3


def test_an_error_may_be_its_own_cause():
    error = RuntimeError("a bug")
    error.__cause__ = error
    assert compile_failure(error) is None


def test_lack_of_memory_while_compiling_is_told_as_such():
    error = error_of("/nonexistent/g++")
    error.__cause__ = RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
    assert compile_failure(error) is None
