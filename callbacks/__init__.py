"""Callbacks: knobs over training time."""
