"""Command line, recipes, processes and Slurm: everything between a person and `train/`."""
