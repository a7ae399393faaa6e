"""A stand-in for the pool of processes, for tests that prepare hundreds of times; others use the real one."""

from collections.abc import Callable
from concurrent.futures import Future

from sinklm.data import tokenizing
from sinklm.data.tokenizer import load_tokenizer_file


class InProcessPool:
    """Does the same work at once, in this process."""

    def __init__(self, num_processes: int, context: object, initializer: object, arguments: tuple):
        tokenizer_file, *others = arguments
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
