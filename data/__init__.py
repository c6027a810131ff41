"""Text to token shards to samples; imports neither model nor train; ranks are ints here."""
