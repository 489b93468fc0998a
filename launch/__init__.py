"""From what this machine is to the right torchrun command: `python -m launch --help`."""
