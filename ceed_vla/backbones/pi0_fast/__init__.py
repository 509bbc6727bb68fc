"""LeRobot's pi0-FAST, with its weights unchanged."""
