"""`ceed-vla ros-demo`: both nodes in a run of episodes, recorded and measured."""
