"""Views: a disk as it was, nothing copied."""
