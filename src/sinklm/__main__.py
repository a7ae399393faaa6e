"""`python -m sinklm`, for launchers: ``torchrun -m sinklm eval zero-shot …``."""

from .cli.main import main

if __name__ == "__main__":
    main()
