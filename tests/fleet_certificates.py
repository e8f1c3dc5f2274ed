"""A fleet's authority and the certificates of its hosts, for tests that speak real TLS."""

from __future__ import annotations

import datetime
import ipaddress
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from rbee.http.tls import client_context

DAY = datetime.timedelta(days=1)


@dataclass(frozen=True)
class Authority:
    """A private authority, its certificate in `folder/ca.crt`."""

    folder: Path
    key: ec.EllipticCurvePrivateKey

    @property
    def file(self) -> Path:
        return self.folder / "ca.crt"

    @property
    def trusted(self) -> ssl.SSLContext:
        """Return what a client of this fleet goes by."""
        return client_context(self.file)

    def host(self, folder: Path, names: Sequence[str] = ("localhost", "127.0.0.1"), *, days: int = 1) -> Path:
        """Write `host.crt` and `host.key` for these names and addresses; negative `days`: it has expired."""
        folder.mkdir(exist_ok=True, parents=True)
        key = ec.generate_private_key(ec.SECP256R1())
        until = datetime.datetime.now(datetime.UTC) + days * DAY
        certificate = _signed("host", key.public_key(), self.key, until, names=[_name(name) for name in names])
        (folder / "host.crt").write_bytes(certificate)
        pem = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        (folder / "host.key").write_bytes(key.private_bytes(*pem))
        (folder / "ca.crt").write_bytes(self.file.read_bytes())
        return folder


def make_authority(folder: Path) -> Authority:
    """Make an authority in a folder."""
    folder.mkdir(exist_ok=True, parents=True)
    authority = Authority(folder, ec.generate_private_key(ec.SECP256R1()))
    until = datetime.datetime.now(datetime.UTC) + DAY
    authority.file.write_bytes(_signed("fleet", authority.key.public_key(), authority.key, until, authority=True))
    return authority


def _name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _signed(
    subject: str,
    key: ec.EllipticCurvePublicKey,
    signer: ec.EllipticCurvePrivateKey,
    until: datetime.datetime,
    *,
    authority: bool = False,
    names: Sequence[x509.GeneralName] = (),
) -> bytes:
    builder = x509.CertificateBuilder(
        subject_name=x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]),
        issuer_name=x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fleet")]),
        public_key=key,
        serial_number=x509.random_serial_number(),
        not_valid_before=until - 2 * DAY,
        not_valid_after=until,
    ).add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(signer, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
