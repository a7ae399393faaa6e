"""``python -m sinklm.train RECIPE key=value …``, for launchers (deepspeed, torchrun, srun)."""

import argparse
import os
import sys

from .run import train


def main() -> None:
    parser = argparse.ArgumentParser(prog="sinklm.train", description="Train a model from a recipe.")
    parser.add_argument("recipe", help="name of a packaged recipe or path of a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that override the recipe's")
    parser.add_argument("--dry-run", action="store_true", help="print the configuration and cost without training")
    parser.add_argument(
        "--trust-checkpoint",
        action="store_true",
        help="resume from a checkpoint without checksums or with pickled code",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    arguments = parser.parse_intermixed_args()
    try:
        train(
            arguments.recipe,
            arguments.overrides,
            only_describe=arguments.dry_run,
            trust_checkpoint=arguments.trust_checkpoint,
        )
    except (ValueError, OSError) as error:
        if os.environ.get("SINKLM_DEBUG"):
            raise
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
