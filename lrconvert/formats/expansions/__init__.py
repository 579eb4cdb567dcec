"""Compact files expanded for servers: `cache` the folders, each made once; `sources` of files, which are not read twice
over; `ranks` what a server needs; `reducing` to a smaller one."""
