"""What drives a robot: the policy node, its safety and interfaces. Imports nothing of the
simulator.
"""
