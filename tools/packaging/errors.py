"""What stops an installation: one line, with the next step in it."""


class InstallError(Exception):
    """Nothing, or nothing more, was changed."""
