"""Secrets are cut out of every text, whole and once, and nothing else is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrconvert.core.errors import LrcError
from lrconvert.core.redaction import redacted

SECRETS = [
    "s3://me:{}@bucket/key",
    "s3://AKIAIOSFODNN7EXAMPLE:{}@bucket/key",
    "sftp://me:{}@host/file",
    "https://me:{}@host:8080/file?versionId=3",
    "https://host/file.safetensors?X-Amz-Algorithm=AWS4&X-Amz-Signature={}",
    "https://host/file?sv=2024&sig={}&se=1",
    "https://host/file#access_token={}",
    "https://host/file?{}",
    "s3:/me:{}@bucket/key",
    "/bucket/key?X-Goog-Signature={}&x=1",
    "AccountName=x;AccountKey={};EndpointSuffix=y",
    "aws_secret_access_key = {}",
    "Authorization: Bearer 0123{}",
]
PLAIN = [
    "s3://bucket/folder/adapter_model.safetensors",
    "hf://org/name@main/folder",
    "hf://gpt2@main",
    "abfs://container@account.dfs.core.windows.net/x",
    "https://host:8080/a@b",
    "https://host/file?versionId=3&revision=main",
    "s3://bucket/part#1",
    "/home/me/a=b/c.safetensors",
    "layers.0: 4 bits, rank=8; seed=1",
    "the store does not answer: TimeoutError: no answer in 60 s",
    "",
]


@pytest.mark.parametrize("text", SECRETS)
@pytest.mark.parametrize("secret", ["wJalrXUtnFEMI", "a/b+c%2Fd==", "p:q"])
def test_what_is_secret_is_cut(text: str, secret: str) -> None:
    whole = f"see '{text.format(secret)}' and <{text.format(secret)}>, done"
    shown = redacted(whole)
    assert secret not in shown and "done" in shown
    assert redacted(shown) == shown


@pytest.mark.parametrize("text", PLAIN)
def test_what_is_not_secret_stays(text: str) -> None:
    assert redacted(text) == text


@given(st.text(max_size=60))
def test_what_was_cut_is_not_cut_again(text: str) -> None:
    for whole in (text, f"s3://{text}", f"https://h/{text}?{text}"):
        assert redacted(redacted(whole)) == redacted(whole)


def test_tokens_of_services() -> None:
    for token in ("AKIAIOSFODNN7EXAMPLE", "hf_abcdefghijklmnopqrstuvwx"):
        assert token not in redacted(f"the key {token} does not exist")


def test_an_error_never_has_one() -> None:
    """In no part of it, whoever names the file."""
    url = "https://me:secret@host/x?sig=secret"
    error = LrcError(f"{url} is refused", fix=f"try {url}").at(url)
    for shown in (str(error), repr(error), error.what, error.fix, error.path, str(error.args)):
        assert shown is not None and "secret" not in shown
    assert "https://***@host/x?sig=***" in str(error)
