"""Scores: images and their references brought together, over training and metrics."""
