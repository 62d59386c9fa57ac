"""Where images come from: folders, lists, shards, arrays, data sets."""
