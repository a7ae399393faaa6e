"""Plans: the names of the study's runs, each with the arguments of `sinklm train`."""

import sys
from pathlib import Path

import yaml


def read_plan(path: Path) -> dict[str, str]:
    try:
        plan = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        sys.exit(f"error: cannot read the plan {path}: {' '.join(str(error).split())}")
    if not isinstance(plan, dict) or not all(isinstance(recipe, str) for recipe in plan.values()):
        sys.exit(f"error: {path} is not a plan: write one line for each run, `name: arguments of sinklm train`")
    return {str(name): recipe for name, recipe in plan.items()}
