from pathlib import Path

import pytest

from .checkpoints import small_model, write_checkpoint

TASKS = Path(__file__).parent / "tasks"


@pytest.fixture(scope="session")
def task_folder(tmp_path_factory) -> Path:
    """Task files with the path of their data filled in, as for users without network."""
    folder = tmp_path_factory.mktemp("tasks")
    for task in TASKS.glob("*.yaml"):
        (folder / task.name).write_text(task.read_text().replace("FOLDER", str(TASKS)))
    return folder


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> dict[int, Path]:
    """Folders of models with 0, 1 and 2 sinks."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return {n: write_checkpoint(folder / f"sinks-{n}", small_model(n)) for n in (0, 1, 2)}
