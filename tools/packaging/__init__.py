"""Installing and removing, as tools/install does it."""
