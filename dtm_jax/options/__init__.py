"""The options of a config: their types, rules and meanings, and the command line."""
