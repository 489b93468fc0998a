"""The page of a run: `python -m eval report`."""
