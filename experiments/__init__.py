"""Experiments: scripts that state a claim and print the number (python -m experiments.NAME --help)."""
