"""How much memory, disk and network a run needs, and what fits."""
