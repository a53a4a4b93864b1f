"""Run transformers classifiers at the right shape."""
