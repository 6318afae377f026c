"""What training costs on any number of GPUs, on paper, and what this host shows of it."""
