"""Recipes: what to run, on what machine, how long it takes and what to expect. Uses the package, is not part of it."""
