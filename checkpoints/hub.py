"""Publish an export on the Hugging Face Hub."""

import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, ModelInfo, get_token
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from ..text import one_line
from .checksums import verify_model_folder
from .export import export_model, is_export
from .folders import resolve_model_folder
from .full_attention import measured_cost

# The files of an export; others that lie in its folder are not published.
PUBLISHED = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer*.json",
    "chat_template.jinja",
    "README.md",
    "LICENSE*",
    "SHA256SUMS",
)
REPLACED = ("*.safetensors", "*.safetensors.index.json", "chat_template.jinja")  # deleted if an older export has more
OF_THE_HUB = {".gitattributes", "README.md"}  # what a new repository may contain


@dataclass(frozen=True)
class Publication:
    """What is published: the name of the repository, sizes in bytes by file, and the model card."""

    repository: str
    files: dict[str, int]
    card: str


def describe_publication(
    checkpoint: str | Path,
    repository: str,
    *,
    dtype: str = "auto",
    full_attention: bool = False,
    text: str | None = None,
) -> Publication:
    """Export a checkpoint to a temporary folder and say what `publish` would upload.

    The Hub is not asked. Arguments and errors are those of `publish`.
    """
    with _staged(checkpoint, repository, dtype, full_attention, text) as folder:
        files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
        return Publication(repository, files, (folder / "README.md").read_text(encoding="utf-8"))


def publish(
    checkpoint: str | Path,
    repository: str,
    *,
    private: bool = False,
    dtype: str = "auto",
    full_attention: bool = False,
    text: str | None = None,
) -> str:
    """Export a checkpoint and upload it, in one commit.

    Args:
        checkpoint: a run, a checkpoint, the folder of a sinklm model, or an export.
        repository: ``owner/name``. It is created if it does not exist.
        private: create a private repository. Without it, the setting of the account decides, which
            is normally public.
        dtype: as for `export_model`; an export is uploaded as it is.
        full_attention: as for `export_model`.
        text: the same.

    Returns:
        The address of the commit.

    Raises:
        ValueError: the name is not ``owner/name``, nobody is logged in, the repository is public
            although ``private`` is set, the model cannot be exported, or ``dtype`` is set for an
            export.
        FileExistsError: the repository has files, and they are not an export.
        OSError: the Hub cannot be reached or refuses the upload.
    """
    _check_name(repository)
    if get_token() is None:
        raise ValueError("nobody is logged in to the Hugging Face Hub: run hf auth login, or set HF_TOKEN")
    api = HfApi()
    with _named_errors(repository):
        _check_repository(api, repository, private)
    with _staged(checkpoint, repository, dtype, full_attention, text) as folder, _named_errors(repository):
        api.create_repo(repository, private=private or None, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message="Export of sinklm",
            delete_patterns=list(REPLACED),
        )
    return str(commit.commit_url)


def _check_name(repository: str) -> None:
    try:
        validate_repo_id(repository)
    except ValueError as error:
        raise ValueError(f"{repository} is not a name on the Hub: {one_line(error)}") from error
    if repository.count("/") != 1:
        raise ValueError(f"{repository} is not a name on the Hub: write owner/name")


def _check_repository(api: HfApi, repository: str, private: bool) -> None:
    """Check that an existing repository may be written to."""
    try:
        info = api.model_info(repository)
    except RepositoryNotFoundError:
        return
    if private and not info.private:
        raise ValueError(
            f"{repository} exists and is public: make it private in its settings on the Hub, or choose another name"
        )
    names = {file.rfilename for file in info.siblings or ()}
    if names - OF_THE_HUB and not _is_published_export(api, info, names):
        raise FileExistsError(f"{repository} exists and is not an export of sinklm: choose another name")


def _is_published_export(api: HfApi, info: ModelInfo, names: set[str]) -> bool:
    if "config.json" not in names:
        return False
    with tempfile.TemporaryDirectory() as folder:
        api.hf_hub_download(info.id, "config.json", local_dir=folder)
        return is_export(Path(folder))


@contextmanager
def _named_errors(repository: str) -> Iterator[None]:
    """Turn the errors of the Hub and of the network into an OSError that names the repository."""
    try:
        yield
    except (ValueError, FileExistsError):
        raise
    except Exception as error:  # httpx, hf_xet and huggingface_hub raise errors without a common base
        raise OSError(f"cannot upload to {repository}: {one_line(error)}") from error


@contextmanager
def _staged(
    checkpoint: str | Path, repository: str, dtype: str, full_attention: bool, text: str | None
) -> Iterator[Path]:
    """Write an export, whose card names the repository, to a temporary folder."""
    _check_name(repository)
    with tempfile.TemporaryDirectory(prefix="sinklm-export-") as parent:
        folder, source = Path(parent) / "export", Path(resolve_model_folder(checkpoint))
        if is_export(source):
            if dtype != "auto":
                raise ValueError(
                    f"{checkpoint} is an export, which is uploaded as it is: leave out --dtype, or pass the checkpoint"
                )
            measured_cost(checkpoint, full_attention, text)
            verify_model_folder(str(source))
            _copy_export(source, folder, repository)
        else:
            export_model(checkpoint, folder, name=repository, dtype=dtype, full_attention=full_attention, text=text)
        yield folder


def _copy_export(source: Path, folder: Path, repository: str) -> None:
    folder.mkdir()
    for path in {path for pattern in PUBLISHED for path in source.glob(pattern) if path.is_file()}:
        shutil.copyfile(path, folder / path.name)
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8") if card.exists() else ""
    card.write_text(re.sub(r'from_pretrained\("[^"]*"', f'from_pretrained("{repository}"', text), encoding="utf-8")
