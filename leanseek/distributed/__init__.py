"""Many processes as one run: what wraps model and trainer from outside."""
