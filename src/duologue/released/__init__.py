"""The released checkpoints of GLM-4-Voice (arXiv:2412.02612): their formats and the modules that only they need."""
