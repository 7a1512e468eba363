"""Measures of images and networks."""
