"""The settings of each network, without the network, which is made when it is asked for."""
