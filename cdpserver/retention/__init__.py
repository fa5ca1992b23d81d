"""How long history is kept: policies, locks, leases, the plan of what goes, and its execution."""
