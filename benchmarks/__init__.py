"""The commands of benchmark.py, one module each, imported when it is called."""
