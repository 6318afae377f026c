"""What this code costs beside plain ways of doing the same: the texts of benchmark.py."""
