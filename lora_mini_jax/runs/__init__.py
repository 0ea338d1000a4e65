"""Runs: from options to a folder with an adapter, a report, and all that lies between."""
