"""Recording of a robot's topics as a LeRobotDataset, from the running robot or from a bag."""
