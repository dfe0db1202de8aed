"""Evaluation (L4): how good the chain and its parts are, computed from the held-out test set."""
