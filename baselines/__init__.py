"""Networks whose trunk differs from model.py's, and published weights."""
