"""Public benchmarks of spoken chatbots: one loader per file, all of them give `BenchmarkItem`."""
