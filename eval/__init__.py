"""A trained model in numbers, text and pictures: `python -m eval --help`."""
