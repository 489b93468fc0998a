"""GPT-2: the model, its hot operations, its weights on a disk, and what it needs of memory."""
