"""A run on the disk: its state, the files that hold it, and the thread that writes them."""
