"""What ranks load, and whether they agree on it."""
