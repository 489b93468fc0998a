"""What a run says of itself: console, metrics.jsonl, status.json, boards."""
