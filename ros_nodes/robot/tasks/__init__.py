"""Tasks: an instruction with a time limit, which may be cancelled and ends with a result.

`runner` has the rules, `topics` and `action` connect them to ROS.
"""
