"""Text to token shards to samples: imports neither model nor anything above; knows ranks only as ints."""
