"""Who embeds in bulk, this machine or a Ray cluster; the shards of its result, and the list of what was left out."""
