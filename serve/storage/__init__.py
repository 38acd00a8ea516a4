"""A gallery on the disk: the parts of its catalog, its folder, and the pictures that it keeps itself."""
