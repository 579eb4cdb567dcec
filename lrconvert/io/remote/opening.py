"""The store at a URL: its driver, or the package that has it."""

from __future__ import annotations

from lrconvert.core.errors import DependencyError, OptionError
from lrconvert.io.remote.failures import told
from lrconvert.io.remote.s3 import S3Store
from lrconvert.io.remote.stores import READ_ONLY, Store
from lrconvert.io.remote.urls import Url, parse

_PACKAGES = {
    **dict.fromkeys(("s3", "s3a"), "s3fs"),
    **dict.fromkeys(("gs", "gcs"), "gcsfs"),
    **dict.fromkeys(("abfs", "abfss", "az", "adl"), "adlfs"),
    **dict.fromkeys(READ_ONLY, "aiohttp"),
    **{"hf": "huggingface_hub", "sftp": "paramiko", "ssh": "paramiko", "smb": "smbprotocol", "hdfs": "pyarrow"},
    **{"oci": "ocifs", "oss": "ossfs", "webdav": "webdav4", "lakefs": "lakefs-spec", "r2": "s3fs", "wandb": "wandbfs"},
}


def open_store(url: Url | str) -> Store:
    """Return what lies at a URL; nothing is asked yet. Raises E-OPTION for what is no URL of a store, E-DEPENDENCY with
    the package to install."""
    url = url if isinstance(url, Url) else parse(url)
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise DependencyError("a place at a URL needs fsspec", fix="run `pip install fsspec`", path=url) from None
    try:
        files, root = url_to_fs(url.text)
    except ImportError:
        package = _PACKAGES.get(url.scheme, "its driver for fsspec")
        raise DependencyError(
            f"{url.scheme}:// needs {package}", fix=f"run `pip install {package}`", path=url
        ) from None
    except ValueError as error:
        known = "s3://, gs://, abfs://, hf://, https:// and what else fsspec has a driver for"
        raise OptionError(f"is no place of a store: {error!s:.200}", fix=f"there are {known}", path=url) from None
    except Exception as error:  # of a driver that logs in at once
        raise told(url, error) from None
    if url.scheme in ("s3", "s3a") and hasattr(files, "call_s3"):
        return S3Store(files, str(root).rstrip("/"), url)
    return Store(files, str(root) if url.scheme in READ_ONLY else str(root).rstrip("/"), url)
