"""Names on the Hugging Face Hub, told apart from mistyped paths by at most one request."""

import re
from pathlib import Path

from .text import message_of, near_hint

NAME = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)
EVERY_REPOSITORY_HAS = ".gitattributes"


class UnreachableError(FileNotFoundError):
    """A name on the Hub that is not in the cache, while the Hub cannot be asked for it."""


def find_on_hub(name: str, kind: str = "model", revision: str | None = None) -> str:
    """Return where to load a name that is not a local path from.

    A name on the Hub is ``owner/name``. If a local folder ``owner`` exists, the name is taken for a
    mistyped path in it, unless it is in the cache of the Hub.

    Args:
        kind: ``model`` or ``dataset``.
        revision: branch, tag or commit that the cache must have; the Hub is not asked for it.

    Returns:
        The name, if the Hub has it or can be asked no further (``HF_HUB_OFFLINE``) and the cache
        has it; the folder in the cache, if the Hub cannot be reached.

    Raises:
        FileNotFoundError: it is neither a folder nor a name on the Hub; an `UnreachableError` if
            the Hub cannot be asked and the cache does not have it.
    """
    from huggingface_hub import constants

    what = {"dataset": "data set"}.get(kind, kind)
    missing = f"{name}: no such {'folder' if kind == 'model' else 'file or folder'}"
    cached = _cached_folder(name, kind, revision)
    at = f" at revision {revision}" if revision else ""
    if cached and constants.HF_HUB_OFFLINE:
        return name
    if not NAME.fullmatch(name) or Path(name).parent.is_dir():
        if cached:
            return name
        is_plain = re.fullmatch(r"[\w.-]+", name, re.ASCII) is not None
        remedy = (
            f"check the path; a {what} on the Hugging Face Hub is named owner/name" if is_plain else "check the path"
        )
        raise FileNotFoundError(f"{missing}; {near_path_hint(name) or remedy}")
    if constants.HF_HUB_OFFLINE:
        raise UnreachableError(
            f"{missing}, and the cache of the Hugging Face Hub has no {what} of this name{at}: check the path, or "
            "unset HF_HUB_OFFLINE to download it"
        )
    reason = _why_unreachable(name, kind, what, missing)
    if reason is None:
        return name
    if cached:
        return cached
    raise UnreachableError(
        f"{missing}, and the Hugging Face Hub cannot be reached ({reason}): check the path, or the connection"
    )


def _why_unreachable(name: str, kind: str, what: str, missing: str) -> str | None:
    """Ask the Hub for a name once. Returns None if it is there, or why the Hub does not answer."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError

    repo_type = None if kind == "model" else kind
    try:
        get_hf_file_metadata(hf_hub_url(name, EVERY_REPOSITORY_HAS, repo_type=repo_type))
    except EntryNotFoundError:
        pass
    except GatedRepoError as error:
        raise FileNotFoundError(
            f"{missing}, and access to the {what} {name} on the Hugging Face Hub is restricted: request it on its page "
            "and run `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{missing}, and the Hugging Face Hub has no {what} of this name: check the name; for a private {what}, "
            "run `hf auth login`"
        ) from error
    except Exception as error:  # the errors of the HTTP library, which differ between versions
        return message_of(error)
    return None


def _cached_folder(name: str, kind: str, revision: str | None) -> str | None:
    from huggingface_hub import snapshot_download

    try:
        repo_type = None if kind == "model" else kind
        return snapshot_download(name, repo_type=repo_type, revision=revision, local_files_only=True)
    except (OSError, ValueError):  # not in the cache, or not a possible name
        return None


def near_path_hint(path: str) -> str:
    """Return ``did you mean …?`` with the files beside a missing path that have a similar name."""
    missing = Path(path)
    if missing.exists():
        return ""
    try:
        beside = [each.name for each in missing.parent.iterdir()]
    except OSError:
        return ""
    return near_hint(missing.name, beside, prefix=str(missing)[: -len(missing.name)] if missing.name else "")
