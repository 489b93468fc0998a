"""`python -m gpt2_ddp.bench`."""

from gpt2_ddp.bench.command import main
from gpt2_ddp.system import cli

if __name__ == "__main__":
    cli.run(main, prints_result=True)
