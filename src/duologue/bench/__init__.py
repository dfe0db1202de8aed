"""Benchmarks: what each stage costs on this machine, against its baseline in the same run."""
