"""A cost model of training on any number of GPUs, and measurements on a host that test its form."""
