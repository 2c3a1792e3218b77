"""Weight files: where they are, their formats, and the names in them."""
