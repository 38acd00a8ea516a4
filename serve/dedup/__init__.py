"""Parts of the search for duplicates: `serve.duplicates` puts them together."""
