"""Vectors that come into a gallery, leave it, move to another one, or change their encoder."""
