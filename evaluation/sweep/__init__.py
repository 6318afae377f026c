"""Which sampling protocol, and which average of the weights, scores best."""
