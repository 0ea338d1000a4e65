"""Adapters as values: planned, made, merged, combined, and put side by side."""
