"""Certificates and keys as the operator gives them, looked at before anything is started."""

from __future__ import annotations

import ssl
from pathlib import Path


def check_tls(cert: Path, key: Path, client_ca: Path | None) -> None:
    """Whether the server can use the files, because grpc says of those that cannot only that it
    failed to bind, and a worker learns it when the model is loaded. Raises ValueError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # Without `password` OpenSSL would ask for it on the terminal.
        context.load_cert_chain(cert, key, password="")
    except OSError as error:
        raise ValueError(
            f"--tls-cert {cert} and --tls-key {key} cannot be used ({_tls_reason(error)}); give "
            "a certificate chain and its private key without a password, both PEM"
        ) from error
    try:
        if client_ca is not None:
            context.load_verify_locations(client_ca)
    except OSError as error:
        raise ValueError(
            f"--tls-client-ca {client_ca} cannot be used ({_tls_reason(error)}); give a "
            "certificate, PEM"
        ) from error


def _tls_reason(error: OSError) -> str:
    reason = getattr(error, "reason", None) or error.strerror or "unreadable"
    return str(reason).replace("_", " ").lower()
