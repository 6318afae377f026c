"""The commands of benchmark.py, one module each, imported only when the command is called."""
