"""Benchmarks: what the stages of Duologue cost on a machine. `duologue bench` runs them from a checkout."""
