"""LeRobot data sets: written as they are recorded, read whole; the recorder, robots and training
share it.
"""
