"""Scores of generated images against real ones; it builds on training and metrics."""
