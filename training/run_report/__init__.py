"""``report.html``: one file that shows a run, or several overlaid, from the run's files.

Nothing here needs torch or the network, and no text of a file is ever taken for HTML.
"""
