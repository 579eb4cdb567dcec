"""S3 through s3fs: listings in pages, one request for a look at a file, and uploads that the server checks.

A small file is one PUT with its SHA-256, which the server compares before the object is there; a large one a multipart
upload, which is there when it is completed. Uploads of this key that a killed run left unfinished, which nobody sees
and which cost storage, are aborted when they are a day old.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrconvert.core.errors import RemoteError
from lrconvert.core.limits import MIB
from lrconvert.io.remote.stores import Entry, Store, entry, refuse_many

_PAGE = 1000  # keys of a listing, the most that S3 gives
_ONE_PUT, _PART, _PARTS = 64 * MIB, 16 * MIB, 9000  # of a multipart upload S3 takes 10,000 parts
_STALE = datetime.timedelta(days=1)
# Buckets of S3 Express list their keys in no order.
_UNORDERED = "--x-s3"
_NOT_IMPLEMENTED = 501


@dataclass(frozen=True)
class S3Store(Store):
    """An object, or the keys with a prefix."""

    @property
    def _bucket(self) -> str:
        return self.root.partition("/")[0]

    @property
    def _key(self) -> str:
        return self.root.partition("/")[2]

    def _call(self, method: str, **more: Any) -> dict[str, Any]:
        answer: dict[str, Any] = self.ask(lambda: self.files.call_s3(method, Bucket=self._bucket, **more))
        return answer

    def stat(self) -> Entry | None:
        """Return the object, None if there is none of that key: one request."""
        if not self._key:
            return None
        try:
            head = self._call("head_object", Key=self._key)
        except FileNotFoundError:
            return None
        return entry(self.url.name, {**head, "size": head["ContentLength"]})

    def names(self) -> list[Entry]:
        """Return the objects directly below the prefix: one request for each thousand."""
        listed: list[Entry] = []
        for page in self._pages(Delimiter="/"):
            listed += page
            refuse_many(len(listed), self.url)
        return listed

    def walk(self) -> Iterator[Entry]:
        """Give the objects below the prefix in the order of their keys, a page at a time."""
        if self._bucket.endswith(_UNORDERED):
            yield from super().walk()
            return
        for page in self._pages():
            yield from page

    def _pages(self, **more: Any) -> Iterator[list[Entry]]:
        prefix = f"{self._key}/" if self._key else ""
        more = {**more, "Prefix": prefix, "MaxKeys": _PAGE}
        while True:
            try:
                answer = self._call("list_objects_v2", **more)
            except FileNotFoundError:  # no such bucket
                return
            keys = ((one["Key"], one) for one in answer.get("Contents", ()))
            yield [
                entry(key[len(prefix) :], {**one, "size": one["Size"]})
                for key, one in keys
                if key != prefix and not key.endswith("/")
            ]
            if not answer.get("IsTruncated"):
                return
            more["ContinuationToken"] = answer["NextContinuationToken"]

    def put(self, source: Path, *, exclusive: bool) -> None:
        """Write a local file to the key. FileExistsError if `exclusive` and it is taken."""
        if source.stat().st_size >= _ONE_PUT:
            self._abort_stale()
            mode = "create" if exclusive else "overwrite"
            part = max(_PART, -(-source.stat().st_size // _PARTS))
            self.ask(lambda: self.files.put_file(str(source), self.root, mode=mode, chunksize=part))
            return
        data = source.read_bytes()
        digest = base64.b64encode(hashlib.sha256(data).digest()).decode()
        request = {"Key": self._key, "Body": data, "ChecksumSHA256": digest}
        if not exclusive:
            self._call("put_object", **request)
            return
        try:
            self._call("put_object", **request, IfNoneMatch="*")
        except RemoteError as error:
            if error.status != _NOT_IMPLEMENTED:
                raise
            if self.stat() is not None:  # a server of S3 that knows no conditions
                raise FileExistsError from None
            self._call("put_object", **request)

    def _abort_stale(self) -> None:
        answer = self._call("list_multipart_uploads", Prefix=self._key)
        now = datetime.datetime.now(datetime.UTC)
        for upload in answer.get("Uploads", ()):
            if upload["Key"] == self._key and now - upload["Initiated"] > _STALE:
                self._call("abort_multipart_upload", Key=self._key, UploadId=upload["UploadId"])

    def remove(self) -> None:
        """Delete the object, which may be gone already."""
        self._call("delete_object", Key=self._key)
