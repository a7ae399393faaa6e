"""Failures of the compilers that torch.compile and Triton run."""

import subprocess

from .text import one_line

# From torch._inductor.exc.InvalidCxxCompiler, and from triton/runtime/build.py.
NOT_FOUND = ("No working C++ compiler found", "Failed to find C compiler", "Failed to find C++ compiler")


def compile_failure(error: BaseException) -> str | None:
    """Return why torch.compile or Triton failed, with a remedy, in one line; None: another error.

    The error and those that caused it are searched, without importing torch. Lack of memory while
    compiling is another error.
    """
    errors = _chain(error)
    texts = [str(each) for each in errors]
    if any("out of memory" in text for text in texts):
        return None
    if any(sign in text for sign in NOT_FOUND for text in texts):
        return "torch.compile and Triton found no C or C++ compiler: install gcc and g++, or set CC and CXX"
    is_of_inductor = any(type(each).__name__ == "CppCompileError" for each in errors)
    is_shared = any(isinstance(each, subprocess.CalledProcessError) and "-shared" in each.cmd for each in errors)
    if is_shared and not is_of_inductor:
        return (
            "Triton's C compiler failed for the reason above: if Python.h is missing, install Python's headers "
            "(python3-dev)"
        )
    if any(cls.__name__ == "BackendCompilerFailed" for cls in type(error).__mro__):
        inner = getattr(error, "inner_exception", error)
        lines = f"{type(inner).__name__}: {inner}".splitlines()
        reason = next((line for line in lines if "error: " in line), lines[0])  # of a compiler, after its command
        return f"torch.compile failed ({one_line(reason)}): SINKLM_DEBUG=1 shows the whole error"
    return None


def _chain(error: BaseException | None) -> list[BaseException]:
    """Return an error, the one that caused it, and so on."""
    errors: list[BaseException] = []
    while error is not None and error not in errors:  # ``raise error from error`` makes a circle
        errors.append(error)
        error = error.__cause__ or error.__context__
    return errors
