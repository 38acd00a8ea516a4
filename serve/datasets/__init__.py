"""Re-ID data sets, each recognised by its layout. A reader makes of the files of a root the set, or None."""
