"""Secrets are cut out of texts that are shown or stored: of URLs their user and password and all that may be a
signature, and tokens that an error of a client repeats.

One function does it, for every message (`core.errors`), outcome, journal, manifest, report and provenance.
"""

from __future__ import annotations

import re

CUT = "***"
# What may stand before the host, with a slash in it where a key was not encoded. A revision of the hub (hf://name@main)
# is no user, nor is a container of Azure's (abfs://container@account).
_USER = re.compile(
    r"(?<![A-Za-z0-9])(?!hf:/)([A-Za-z][A-Za-z0-9+.-]+:/{1,2})(?!/)"
    r"(?:(?<!abfs://)(?<!abfss://)(?<!abfs:/)(?<!abfss:/)[^/\s\"'<>]*|[^/\s\"'<>:@]+:(?!\d+/)[^\s\"'<>@]*)@"
)
# Of a query all is cut but what names a version: services sign with parameters of many names.
_QUERY = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*:/{1,2}[^\s\"'<>?#]*)([?#][^\s\"'<>]+)")
_PARAMETER = re.compile(r"([?&#;])([^=&#;]*)=([^&#;]*)")
_PLAIN = frozenset({"versionid", "version", "revision", "rev", "generation", "snapshot", "download"})
# Parameters and fields of the services' own, wherever they stand.
_NAMED = re.compile(
    r"(?i)\b(x-(?:amz|goog)-[a-z-]*(?:signature|credential|token|key)[a-z-]*|awsaccesskeyid|signature|sig|accountkey"
    r"|sharedaccesssignature|aws_secret_access_key|aws_access_key_id|aws_session_token|access_token|password|secret)"
    r"(\s*[=:]\s*)(?!\*\*\*)[^\s&;,\"'<>]+"
)
_TOKENS = re.compile(r"\b(?:AKIA|ASIA|AROA|AIDA)[A-Z0-9]{12,}|\bhf_[A-Za-z0-9]{16,}|(?i:\bbearer)\s+[^\s,'\"<>]{7,}")


def redacted(text: str) -> str:
    """Return `text` without secrets: ``s3://***@host/key``, ``https://host/file?X-Amz-Signature=***``. Text that has
    none is returned as it is, and so is what this function has returned."""
    if ":/" in text:
        text = _USER.sub(rf"\g<1>{CUT}@", text)
        text = _QUERY.sub(lambda match: match[1] + _plain(match[2]), text)
    return _TOKENS.sub(CUT, _NAMED.sub(rf"\g<1>\g<2>{CUT}", text))


def _plain(query: str) -> str:
    """A query or fragment whose values are cut, but for those of parameters that name a version; a fragment without any
    is part of a name."""
    if "=" not in query:
        return query if query[0] == "#" else f"?{CUT}"
    return _PARAMETER.sub(lambda m: m[0] if m[2].lower() in _PLAIN else f"{m[1]}{m[2]}={CUT}", query)
