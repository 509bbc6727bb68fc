"""OpenVLA models, with published weights."""
