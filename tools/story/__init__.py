"""The parts of `tools/demo`."""
