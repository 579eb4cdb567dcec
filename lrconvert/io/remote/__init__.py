"""Adapters at URLs, through fsspec and the driver of each protocol: `urls` what a URL is and how it is shown, `stores`
what each kind promises, `s3` the one with pages and conditions, `failures` what is tried again, `listing` which
adapters are below a prefix, `fetching` and `publishing`. Drivers, and fsspec itself, are imported where they are used.
"""

from lrconvert.io.remote.failures import missing
from lrconvert.io.remote.fetching import Files, fetch, fetched, fetched_file, files_of, folder, local_copy, named
from lrconvert.io.remote.listing import Adapter, adapters, state_of
from lrconvert.io.remote.opening import open_store
from lrconvert.io.remote.publishing import check_output, publish, publish_folder
from lrconvert.io.remote.stores import Entry, Store, check_writable
from lrconvert.io.remote.urls import Url, is_remote, is_url, local_path, parse

__all__ = [
    "Adapter",
    "Entry",
    "Files",
    "Store",
    "Url",
    "adapters",
    "check_output",
    "check_writable",
    "fetch",
    "fetched",
    "fetched_file",
    "files_of",
    "folder",
    "is_remote",
    "is_url",
    "local_copy",
    "local_path",
    "missing",
    "named",
    "open_store",
    "parse",
    "publish",
    "publish_folder",
    "state_of",
]
