"""Credentials inside addresses: no word and no file may hold them, and no text may show them.

An address of the configuration is written down in many places: the resolved configuration, the
report, the parameters of an MLflow run, messages of libraries. So one that carries credentials
(`scheme://user:password@host`, `?token=...`, a signed query) is refused, and the refusal names the
environment variables that carry them instead. `mask` is the filter of everything else that is
printed or kept: errors of libraries may name addresses that came from the environment.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from typing import Any

HIDDEN = "***"
# A user part ends at the last @ before the path; a colon that no port follows begins a password
# that holds a slash or a question mark itself.
_USER = re.compile(
    r"(?<=://)(?:[^\s/?#'\"<>]*@|[^\s/?#:@'\"<>]*:(?!\d{0,5}(?:[/?#\s'\"<>),]|$))\S*@)"
)
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
# Names of query fields whose value is a secret, as services and their signed addresses spell them.
_QUERY = re.compile(
    r"([?&;#](?:[\w.%-]*(?:token|secret|passw(?:or)?d|pwd|signature|credential|api_?-?key"
    r"|access_?-?key(?:_?-?id)?|authorization)[\w.%-]*|sig|auth|key|jwt)=)([^&;#\s'\"<>]+)",
    re.IGNORECASE,
)
# Stores whose address names a container before the @, which is no secret.
_CONTAINERS = {"abfs", "abfss", "wasb", "wasbs", "az"}
_WAYS = {
    "s3": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN",
    "s3a": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "gcs": "GOOGLE_APPLICATION_CREDENTIALS",
    "postgresql": "PGPASSWORD",
    **dict.fromkeys(_CONTAINERS, "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY"),
}
_MLFLOW = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
_FSSPEC = """FSSPEC_{scheme}='{{"headers": {{"Authorization": "..."}}}}'"""


def mask(text: str) -> str:
    """`text` with the credentials of every address in it replaced by asterisks."""
    if "://" in text:
        text = _USER.sub(_masked_user, text)
    return _QUERY.sub(rf"\g<1>{HIDDEN}", text) if "=" in text else text


def mask_uri(uri: str) -> str:
    """An address without its credentials, whatever characters they have."""
    return mask(_whole(uri))


def mask_tree(value: Any) -> Any:
    """Plain data with every text in it masked."""
    if isinstance(value, str):
        return mask(value)
    if isinstance(value, Mapping):
        return {key: mask_tree(inner) for key, inner in value.items()}
    return [mask_tree(inner) for inner in value] if isinstance(value, list | tuple) else value


def credentials_in(data: Any, key: str = "") -> Iterator[str]:
    """One line for each address with credentials in plain data, naming its key and the way out."""
    if isinstance(data, str):
        if "://" in data and (masked := mask_uri(data)) != _whole(data):
            yield f"{key}={masked}: {_way_out(key, data)}"
    elif isinstance(data, Mapping):
        for name, inner in data.items():
            yield from credentials_in(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(data, list):
        for number, inner in enumerate(data):
            yield from credentials_in(inner, f"{key}.{number}")


class MaskingFormatter(logging.Formatter):
    """A log line without credentials."""

    def format(self, record: logging.LogRecord) -> str:
        """The line as it is shown."""
        return mask(super().format(record))


def _whole(uri: str) -> str:
    # The whole text is the address, so spaces and quotes are part of it.
    return re.sub(r"[\s'\"<>]", "_", uri)


def _masked_user(match: re.Match[str]) -> str:
    scheme = _SCHEME.findall(match.string[: match.start()])
    named = scheme[-1].lower() if scheme else ""
    user, _, _ = match[0].rpartition("@")
    # http://TOKEN@host is a secret, hdfs://user@host and abfs://container@account are none.
    if ":" not in user and (named in _CONTAINERS or named not in ("http", "https", "s3", "s3a")):
        return match[0]
    return f"{HIDDEN}@"


def _way_out(key: str, uri: str) -> str:
    schemes = _SCHEME.findall(uri)
    scheme = str(schemes[-1]).lower().partition("+")[0]  # postgresql+psycopg2
    where = _WAYS.get(scheme)
    if where is None and scheme in ("http", "https"):
        is_server = key.rpartition(".")[2] == "tracking_uri"
        where = _MLFLOW if is_server else _FSSPEC.format(scheme=scheme.upper())
    told = f"give it without them and set {where}" if where else "give one that needs none"
    return f"credentials in an address would end up in reports, databases and logs; {told}"
