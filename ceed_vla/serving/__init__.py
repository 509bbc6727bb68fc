"""Runs a policy for a robot, in this process or for clients over a network. Free of ROS.

A `ceed_vla.serving.predictor.Predictor` turns a request into a chunk of actions, with whichever
engine and whichever LeRobot policy.
"""
