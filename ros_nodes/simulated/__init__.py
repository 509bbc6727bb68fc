"""A simulated robot with the topics of a real one."""
