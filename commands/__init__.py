"""Commands of the programs, one module each, imported only when the command is called."""
