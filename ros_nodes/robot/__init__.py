"""The policy node, its safety and its interfaces; independent of the simulator."""
