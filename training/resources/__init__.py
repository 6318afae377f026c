"""What a run needs of memory, disk and network, and what fits."""
