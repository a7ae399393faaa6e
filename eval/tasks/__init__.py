"""Task files for lm-eval; ``--include-path`` of lm-eval itself accepts this folder too."""
