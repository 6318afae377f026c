"""The settings of each architecture, importable without the code of its network."""
