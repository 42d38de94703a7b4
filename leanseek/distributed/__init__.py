"""A run on several ranks: applied to model and trainer from outside."""
