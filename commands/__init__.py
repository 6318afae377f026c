"""What fid.py and dataset_tool.py offer: a module for each command, loaded when it is called."""
