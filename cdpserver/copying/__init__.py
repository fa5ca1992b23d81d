"""Copying a disk from an NBD export to a file or another export, so that it can go on where it was cut off."""
