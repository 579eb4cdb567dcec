"""Second readers: each module but `parts` decodes the method of its name, written from the pages in formats/ alone."""
