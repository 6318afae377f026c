"""What normal training looks like: curves of several seeds, their band, and a run inside it.

Nothing here needs torch or the network.
"""
