"""Plans: the runs of the study by name, and what `sinklm train` is to be given for each."""

import sys
from pathlib import Path

import yaml


def read_plan(path: Path) -> dict[str, str]:
    try:
        plan = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        sys.exit(f"error: the plan {path} cannot be read: {' '.join(str(error).split())}")
    if not isinstance(plan, dict) or not all(isinstance(recipe, str) for recipe in plan.values()):
        sys.exit(f"error: {path} is no plan: write a line a run, its name and what sinklm train is to be given")
    return {str(name): recipe for name, recipe in plan.items()}
