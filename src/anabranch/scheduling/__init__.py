"""Which request runs next, which pages of keys and values stay, when thinking stops."""
