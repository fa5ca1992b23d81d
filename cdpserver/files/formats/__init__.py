"""The file systems: one interface, a module each, on dissect's parsers."""
