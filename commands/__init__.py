"""The verbs of `simclr`, by subject: a class each; its fields are the options, calling it does the work."""
