"""The transformer, in plain torch: imports neither data nor anything above."""
