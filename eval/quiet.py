"""Hides what lm-eval and the libraries under it print, except the progress of the evaluation."""

import contextlib
import functools
import logging
import os
from collections.abc import Iterator
from typing import Any

from lm_eval.api.task import tqdm
from transformers.utils import logging as transformers_logging

LOGGERS = ("lm_eval", "datasets", "evaluate", "accelerate", "huggingface_hub", "httpx", "filelock", "fsspec")
PROGRESS = "Running "  # beginning of the description of lm-eval's bars of requests


@contextlib.contextmanager
def quiet_libraries(*, shows_progress: bool = True) -> Iterator[None]:
    """Show only errors of libraries, downloads and one progress bar for each kind of request.

    Args:
        shows_progress: False hides the progress bars too.
    """
    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    verbosity = transformers_logging.get_verbosity()
    bars: Any = next(kind for kind in tqdm.__mro__ if kind.__module__ == "tqdm.std")
    create = bars.__init__

    @functools.wraps(create)
    def create_if_wanted(self: Any, *arguments: Any, **options: Any) -> None:
        is_wanted = options.get("unit") == "B" or str(options.get("desc") or "").startswith(PROGRESS)
        if not (shows_progress and is_wanted):
            options["disable"] = True
        create(self, *arguments, **options)

    try:
        for name in LOGGERS:
            logging.getLogger(name).setLevel(logging.ERROR)
        transformers_logging.set_verbosity_error()
        bars.__init__ = create_if_wanted
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            yield
    finally:
        bars.__init__ = create
        transformers_logging.set_verbosity(verbosity)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
