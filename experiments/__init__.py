"""Programs that use the whole library."""
