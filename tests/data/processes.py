"""Replaces the pool of processes in tests that prepare hundreds of times."""

from collections.abc import Callable
from concurrent.futures import Future

from sinklm.data import tokenizing
from sinklm.data.tokenizer import load_tokenizer_file


class InProcessPool:
    """Does the same work immediately, in this process."""

    def __init__(self, num_processes: int, context: object, initializer: object, arguments: tuple):
        _, tokenizer_file, *others = arguments
        tokenizing._work = tokenizing.DocumentTokenizer(load_tokenizer_file(tokenizer_file), *others)

    def submit(self, function: Callable, *arguments: object) -> Future:
        future: Future = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future

    def shutdown(self, cancel_futures: bool) -> None:
        pass
