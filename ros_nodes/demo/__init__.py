"""`ceed-vla ros-demo`: records and measures a run of episodes with both nodes."""
