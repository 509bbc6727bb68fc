"""What trains the modules of axes of early exit; one file an axis, named like its folder in
`ceed_vla.axes`.
"""
