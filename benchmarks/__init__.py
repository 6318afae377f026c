"""What benchmark.py measures: a module for each command, loaded when it is called."""
