"""Checked WebDataset shards -> a video encoder trained by latent regression of a frozen teacher (SALT)."""

__version__ = "0.1.0"
