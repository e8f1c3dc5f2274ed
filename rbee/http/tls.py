"""TLS between the programs of one fleet: TLS 1.3 only (RFC 8446), the fleet's own authority and no other."""

from __future__ import annotations

import ssl
from pathlib import Path

from rbee.errors import SetupProblem


def server_context(certificate: Path, key: Path) -> ssl.SSLContext:
    """Return the context of a server with this certificate chain and key (PEM). Raises: SetupProblem."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    # Connections are kept, so nothing is resumed; and a ticket makes a client's socket readable with no answer in it.
    context.num_tickets = 0
    try:
        context.load_cert_chain(certificate, key)
    except OSError as problem:
        raise _unusable(f"the certificate {certificate} with the key {key}", problem) from None
    return context


def client_context(authority: Path) -> ssl.SSLContext:
    """Return the context of a client that trusts this authority (PEM) and none of the machine's. Raises: SetupProblem.

    The server's certificate must name the host or the IP address that was dialled (RFC 9525).
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        context.load_verify_locations(cafile=str(authority))
    except OSError as problem:
        raise _unusable(f"the authority {authority}", problem) from None
    return context


def reason(problem: OSError) -> str:
    """Say in a person's words why a TLS connection did not come about."""
    if isinstance(problem, ssl.SSLCertVerificationError):
        return f"its certificate is refused: {problem.verify_message.rstrip('.')}"
    if isinstance(problem, ssl.SSLError) and problem.reason == "WRONG_VERSION_NUMBER":
        return "it does not speak TLS"
    if isinstance(problem, ssl.SSLError):
        return f"no TLS connection comes about: {(problem.reason or str(problem)).replace('_', ' ').lower()}"
    return str(problem)


def _unusable(what: str, problem: OSError) -> SetupProblem:
    if isinstance(problem, ssl.SSLError):
        why = (problem.reason or str(problem)).replace("_", " ").lower()
    else:
        why = problem.strerror or str(problem)
    return SetupProblem(f"TLS cannot use {what} ({why})", hint="rbee apply writes these files")
