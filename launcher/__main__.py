"""`python -m launcher ...` is `headrace ...`: what torchrun and srun start on every rank."""

from launcher.cli import main

if __name__ == "__main__":
    main()
