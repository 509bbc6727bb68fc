"""ROS 2 nodes: a policy node that streams action chunks to a robot, and a simulated robot with the
same topics.
"""

if __name__ == "ros_nodes":  # the name of earlier versions
    from ceed_vla.former_names import redirect

    redirect(__name__)
