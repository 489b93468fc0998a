"""The one-line way in: `python train_gpt2.py [flags]`, `torchrun --nproc_per_node=8 train_gpt2.py [flags]`."""

if __name__ == "__main__":
    from gpt2_ddp.system import cli
    from gpt2_ddp.train import main

    cli.run(main)
