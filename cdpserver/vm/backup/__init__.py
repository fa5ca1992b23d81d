"""Backups of running VMs that CDP does not protect: QEMU's backup job sends what its dirty bitmap marks."""
