"""Many conversations on several GPUs or machines: cells of one model each, spread by Ray Serve."""
