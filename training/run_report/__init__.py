"""``report.html``: one page that shows a run, or several overlaid, from the files of the runs.

Nothing here needs torch or the network, and all text from files is escaped.
"""
