"""Exports of checkpoints as ONNX graphs, which `ceed_vla.edge` runs."""
