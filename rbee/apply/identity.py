"""Who a fleet is: its secret, from which every token is derived, and its own certificate authority.

Both lie beside the inventory in `.rbee/`, which git does not take. Whoever has that folder can run the fleet.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import ipaddress
import os
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rbee.errors import SetupProblem
from rbee.inventory.fleet import Host
from rbee.paths import private, write_private
from rbee.tokens import derived_token

if TYPE_CHECKING:
    from cryptography import x509

FOLDER = ".rbee"
IDENTITY_VARIABLE = "RBEE_IDENTITY"
SECRET, AUTHORITY, AUTHORITY_KEY = "fleet.key", "ca.crt", "ca.key"
AUTHORITY_DAYS, HOST_DAYS, RENEWED_DAYS = 7300, 3650, 365
DAY = datetime.timedelta(days=1)


@dataclass(frozen=True)
class Identity:
    """The fleet's secret and authority, read from its folder."""

    folder: Path
    secret: str
    authority: str
    """The authority's certificate, PEM."""

    def hive_token(self, host: str) -> str:
        """Return what the queen shows to the hive of a host."""
        return derived_token(self.secret, "hive", host)

    def worker_token(self, host: str, worker: str) -> str:
        """Return what opens a worker."""
        return derived_token(self.secret, "worker", host, worker)

    def certifies(self, host: Host, pem: str) -> bool:
        """Return True when `pem` is this host's certificate, by this authority, and good for another year.

        The answer is noted, for it takes longer to import what checks it than to do all else.
        """
        if not pem:
            return False
        seal = f"{pem}{self.authority}{host.name}\0{host.hostname}"
        note = self.folder / "certified" / hashlib.sha256(seal.encode()).hexdigest()
        with contextlib.suppress(OSError, ValueError):
            return time.time() < float(note.read_text())
        until = self._good_until(host, pem)
        if until is None:
            return False
        with contextlib.suppress(OSError):  # a service's credentials cannot be written
            write_private(private(note.parent) / note.name, str(until).encode())
        return time.time() < until

    def _good_until(self, host: Host, pem: str) -> float | None:
        """Return when a certificate should be renewed, or None when it is not this host's."""
        from cryptography import x509
        from cryptography.exceptions import InvalidSignature

        try:
            certificate = x509.load_pem_x509_certificate(pem.encode())
            certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(self.authority.encode()))
            names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        except (ValueError, TypeError, InvalidSignature, x509.ExtensionNotFound):
            return None
        if list(names) != _names(host):
            return None
        return (certificate.not_valid_after_utc - RENEWED_DAYS * DAY).timestamp()

    def certify(self, host: Host) -> tuple[str, str]:
        """Return a new certificate and its key for a host, both PEM (RFC 5280; ECDSA P-256)."""
        from cryptography import x509
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        key = ec.generate_private_key(ec.SECP256R1())
        authority = x509.load_pem_x509_certificate(self.authority.encode())
        try:
            signer = load_pem_private_key((self.folder / AUTHORITY_KEY).read_bytes(), None)
        except OSError as problem:
            raise SetupProblem(
                f"{host.name} needs a certificate, and {self.folder / AUTHORITY_KEY} cannot be read"
                f" ({problem.strerror})"
            ) from None
        builder = _builder(host.name, authority.subject, key.public_key(), HOST_DAYS)
        builder = builder.add_extension(x509.SubjectAlternativeName(_names(host)), critical=False)
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        return _signed(builder, signer), _key_text(key)


def identity_of(inventory: Path, *, make: bool = True) -> Identity:
    """Return the identity of an inventory folder; the first apply makes one. Raises: SetupProblem.

    RBEE_IDENTITY names another folder, where none is ever made: a checkout that lost its identity is no new fleet.
    """
    elsewhere = os.environ.get(IDENTITY_VARIABLE)
    folder = Path(elsewhere) if elsewhere else inventory / FOLDER
    try:
        if make and not elsewhere and not (folder / AUTHORITY).exists():
            _make(private(folder))
        return Identity(folder, (folder / SECRET).read_text().strip(), (folder / AUTHORITY).read_text())
    except OSError as problem:
        raise SetupProblem(
            f"The fleet's identity in {folder} cannot be read or made ({problem.strerror})",
            hint="copy the folder from where the fleet was applied first",
        ) from None


def _make(folder: Path) -> None:
    """Make secret and authority; the certificate comes last, so its presence means that all is there."""
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

    write_private(folder / ".gitignore", b"*\n")
    if not (folder / SECRET).exists():
        write_private(folder / SECRET, secrets.token_urlsafe(32).encode() + b"\n")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "rbee fleet")])
    builder = _builder("rbee fleet", name, key.public_key(), AUTHORITY_DAYS)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    write_private(folder / AUTHORITY_KEY, _key_text(key).encode())
    write_private(folder / AUTHORITY, _signed(builder, key).encode())


def _builder(subject: str, issuer: x509.Name, public_key: object, days: int) -> x509.CertificateBuilder:
    from cryptography import x509

    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder(issuer_name=issuer)
    builder = builder.subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, subject)]))
    # A host's clock may lag behind this one's.
    builder = builder.not_valid_before(now - 2 * DAY).not_valid_after(now + days * DAY)
    builder = builder.serial_number(x509.random_serial_number())
    return builder.public_key(public_key)  # type: ignore[arg-type]  # one of cryptography's own


def _signed(builder: x509.CertificateBuilder, key: object) -> str:
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.serialization import Encoding

    certificate = builder.sign(key, hashes.SHA256())  # type: ignore[arg-type]
    return certificate.public_bytes(Encoding.PEM).decode()


def _key_text(key: object) -> str:
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    data: bytes = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())  # type: ignore[attr-defined]
    return data.decode()


def _names(host: Host) -> list[x509.GeneralName]:
    """Return what the host may be called: its name, its address, and, for the host itself, its loopback."""
    from cryptography import x509

    names: list[x509.GeneralName] = [x509.DNSName(host.name.lower())]
    try:
        names.append(x509.IPAddress(ipaddress.ip_address(host.hostname)))
    except ValueError:
        if host.hostname.lower() != host.name.lower():
            names.append(x509.DNSName(host.hostname.lower()))
    names += [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    return [*names, x509.UniformResourceIdentifier(f"urn:rbee:hive:{host.name}")]
