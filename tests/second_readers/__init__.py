"""Second readers: each module but `container`, the frame, `parts` and `coded`, the payload, decodes the method of its
name, written from the pages in formats/ alone."""
