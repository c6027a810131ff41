"""Text to token shards to samples; imports neither model nor anything above; knows ranks as ints."""
