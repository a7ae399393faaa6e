"""StreamEval as a task of lm-eval."""
