"""How good a model is: lm-eval's tasks, and data sets that ship in packages, through the engine in this process."""
