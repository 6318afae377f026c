"""A cost model of training on any number of GPUs, and measurements on this host that test it."""
