"""The search for the sampling protocol, and the average of the weights, that score best."""
