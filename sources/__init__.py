"""Data sets: each file is one kind of source, and a row of data.SOURCES."""
