"""The target: where a mirror writes. The only process that appends to journals."""
