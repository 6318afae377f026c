"""What normal training looks like: curves of several seeds, their bands, and a run beside them.

Nothing here needs torch or the network.
"""
