"""Scores of generated images against real ones: detectors, statistics, distances, references."""
