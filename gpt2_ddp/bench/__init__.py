"""`python -m gpt2_ddp.bench`: what each means adds, what `auto` takes, and GPUs on paper."""
