"""A gallery in Milvus: the other store behind serve/gallery.py."""
