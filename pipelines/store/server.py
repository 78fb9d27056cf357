"""Whether a tracking server answers, asked before any work and with a time limit."""

from __future__ import annotations

import os
import ssl
import urllib.error
import urllib.request
from urllib.parse import urlsplit, urlunsplit

from pipelines.config import UserError

# How long a server may take to answer before any work is begun.
SECONDS = 5.0
# MLflow's own requests, later on: by default it would wait for minutes, and say nothing.
_LIMITS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
}


def refuse_silent(uri: str, seconds: float = SECONDS) -> None:
    """Refuse a tracking server that does not answer; any answer will do here.

    Args:
        uri: of the MLflow store; one that is no HTTP server is not asked.
        seconds: to wait for.

    Raises:
        UserError: where nothing answers.
    """
    parts = urlsplit(uri)
    if parts.scheme not in ("http", "https"):
        return
    for name, value in _LIMITS.items():
        os.environ.setdefault(name, value)
    host = parts.netloc.rpartition("@")[2]  # a password is for MLflow alone
    place = urlunsplit((parts.scheme, host, f"{parts.path.rstrip('/')}/health", "", ""))
    # Who it is does not matter yet, and MLflow has settings of its own for certificates.
    trusting = ssl._create_unverified_context()
    try:
        with urllib.request.urlopen(place, timeout=seconds, context=trusting):
            return
    except urllib.error.HTTPError:
        return
    except (OSError, ValueError) as error:
        why = getattr(error, "reason", None) or error
        raise UserError(
            f"tracking_uri={urlunsplit((parts.scheme, host, parts.path, '', ''))}: no MLflow "
            f"server answers there within {seconds:g} s ({why}); start it, or leave tracking_uri "
            "away for SQLite in the storage folder"
        ) from None
