"""The commands of fid.py and dataset_tool.py, one module each, imported when it is called."""
