"""``python -m sinklm.train RECIPE key=value …``, for launchers (deepspeed, torchrun, srun)."""

import argparse
import sys

from ..command import run
from .keys import key_hint
from .run import train


def main() -> None:
    parser = argparse.ArgumentParser(prog="sinklm.train", description="Train a model from a recipe.")
    parser.add_argument("recipe", help="name of a packaged recipe, path of a YAML file, or folder of a run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that override the recipe's")
    parser.add_argument("--dry-run", action="store_true", help="print the configuration and cost without training")
    parser.add_argument(
        "--trust-checkpoint",
        action="store_true",
        help="resume from a checkpoint without checksums or with pickled code",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    arguments, unknown = parser.parse_known_intermixed_args()
    if unknown:
        option = unknown[0].partition("=")[0]
        hint = key_hint(option, ["--dry-run", "--trust-checkpoint"], sys.argv)
        print(f"error: no such option {option}{f': {hint}' if hint else ''}", file=sys.stderr)
        sys.exit(2)
    run(
        lambda: train(
            arguments.recipe,
            arguments.overrides,
            only_describe=arguments.dry_run,
            trust_checkpoint=arguments.trust_checkpoint,
        )
    )


if __name__ == "__main__":
    main()
