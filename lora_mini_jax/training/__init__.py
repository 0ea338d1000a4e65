"""The training step, optimisers, and factors that come from data."""
