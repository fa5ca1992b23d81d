"""The operator's side: the `cdp` command."""
