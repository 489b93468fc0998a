"""Train GPT-2 with torchrun and DistributedDataParallel."""
