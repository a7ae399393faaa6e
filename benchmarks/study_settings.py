"""Settings of a study, in its folder: calls with other settings do not mix their results."""

import json
from pathlib import Path
from typing import Any

NAME = "settings.json"


def keep_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Store settings in a folder, or compare them with those that it has.

    Args:
        settings: those that change results, by their names on the command line.

    Raises:
        SystemExit: the folder was begun with another value of one of them.
    """
    path = folder / NAME
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    given = json.loads(json.dumps(settings, default=str))
    for name, value in given.items():
        if known.setdefault(name, value) != value:
            raise SystemExit(f"{folder} was begun with {name} {known[name]}, not {value}: use another folder")
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
