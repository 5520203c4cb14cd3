"""What runs: kernels as torch ops, the engines behind them, their inputs, tile lists and the cache of generated files."""
