"""Plans: the names of the study's runs, each with the arguments of `sinklm train`."""

import sys
from pathlib import Path

from sinklm.parsing import parse_yaml


def read_plan(path: Path) -> dict[str, str]:
    try:
        plan = parse_yaml(path.read_bytes())
    except (OSError, ValueError) as error:
        sys.exit(f"error: cannot read the plan {path}: {error}")
    if not isinstance(plan, dict) or not all(isinstance(recipe, str) for recipe in plan.values()):
        sys.exit(f"error: {path} is not a plan: write one line for each run, `name: arguments of sinklm train`")
    return {str(name): recipe for name, recipe in plan.items()}
