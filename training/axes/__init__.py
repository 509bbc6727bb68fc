"""Training of the modules of axes; one file per axis, named like its folder in `ceed_vla.axes`."""
