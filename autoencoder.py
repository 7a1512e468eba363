"""The autoencoder is in latents.py."""
from latents import decoder_of  # noqa: F401
