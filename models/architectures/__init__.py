"""The settings of each network, which can be imported without the network."""
