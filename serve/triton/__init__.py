"""Triton as a client sees it, and as it is started and watched."""
