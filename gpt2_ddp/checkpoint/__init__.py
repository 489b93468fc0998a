"""A run on the disk: its files, the thread that writes them, and where a run goes on."""
