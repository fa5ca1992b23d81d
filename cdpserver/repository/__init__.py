"""The backup repository: disks as chunks that are stored once, in a place off this machine."""
