"""The Trio service around the other processes."""
