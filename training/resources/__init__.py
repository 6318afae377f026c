"""How much memory, disk, network and time a run needs, and which batch fits."""
