"""The nbdkit plugins: every NBD listener of the project."""
