"""``python -m sinklm.train RECIPE key=value …``, for launchers (deepspeed, torchrun, srun)."""

import argparse

from ..command import run
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
