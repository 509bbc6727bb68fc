"""Recording of LeRobot data sets: what one attempt yields, and how episodes reach the disk
safely.
"""
