"""The command line: what it is told, and how models, checkpoints and data are found by name."""
