"""How pictures come besides plain folders: archives, webdataset shards, lists, CIFAR; and the cached listing of folders."""
