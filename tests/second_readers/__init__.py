"""Second readers: each module but `parts` and `coded`, a kind of payload, decodes the method of its name,
written from the pages in formats/ alone."""
