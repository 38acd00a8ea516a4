"""Re-ID data sets, each recognised by its layout. Every module has one `read`: the files of a root -> the set, or None."""
