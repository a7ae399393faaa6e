"""Write the manifest of a checkpoint."""

from pathlib import Path

from sinklm.checkpoints.folders import step_of
from sinklm.checkpoints.manifest import Manifest, describe_files, owned_files, write_manifest


def seal(checkpoint: Path) -> None:
    """Complete a checkpoint with its files as they are now, as someone who edits them would."""
    files = describe_files(checkpoint, owned_files(checkpoint, 0, 1))
    write_manifest(checkpoint, Manifest(step_of(checkpoint), files))
