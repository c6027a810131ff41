"""Built-in recipes, one TOML file each."""
