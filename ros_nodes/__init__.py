"""ROS 2 nodes: a policy node that streams action chunks to a robot, and a simulated robot behind the same topics."""
