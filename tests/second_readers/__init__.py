"""Second readers: each module but `container`, the frame, `parts` and `coded`, the payload, and `fleet`, many files in
one folder, decodes the method of its name, written from the pages in formats/ alone."""
