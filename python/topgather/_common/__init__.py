"""What every op stands on and nothing of which knows an op: descriptions, checks, the dispatcher, CUDA's host side."""
