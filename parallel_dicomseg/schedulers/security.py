"""Whom a run talks to: whoever reaches a Dask cluster can run programs there and see the images."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from parallel_dicomseg.errors import ConfigurationError
from parallel_dicomseg.records import ConvertOptions

_ENCRYPTED = ("tls", "wss")


@dataclass(frozen=True, slots=True)
class Certificates:
    """Paths of PEM files; all or none are ''."""

    ca_file: str
    cert: str
    key: str

    def __bool__(self) -> bool:
        return bool(self.ca_file)


def certificates_of(options: ConvertOptions) -> Certificates:
    """The certificates that options name.

    Raises
    ------
    ConfigurationError
        Some are named and others not, or a file is not there.
    """
    named = {name: getattr(options, name) for name in ("tls_ca_file", "tls_cert", "tls_key")}
    missing = [name for name, path in named.items() if not path]
    if missing and len(missing) < len(named):
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in missing)
        raise ConfigurationError(f"certificates need all three files; {flags} is missing")
    for name, path in named.items():
        if path and not Path(path).is_file():
            raise ConfigurationError(f"{name} is {path!r}; there is no such file")
    return Certificates(*named.values())


def security_for(distributed: Any, address: str, options: ConvertOptions) -> Any:
    """The certificates to show at a scheduler's address; None: none are needed.

    Parameters
    ----------
    distributed
        The package.
    address
        As Dask spells it, e.g. 'tls://host:8786'.
    options
        Of them the certificates, and whether an open network is allowed; certificates that Dask's
        own configuration names do as well.

    Raises
    ------
    ConfigurationError
        The address is beyond this machine and not encrypted, or certificates are missing.
    """
    files = certificates_of(options)
    if not is_encrypted(address):
        if files:
            raise ConfigurationError(
                f"certificates are given, but {address} is not encrypted; use tls://"
            )
        check_allowed("scheduler", address, options)
        return None
    security = distributed.Security(
        **{"tls_ca_file": files.ca_file, "tls_client_cert": files.cert, "tls_client_key": files.key}
        if files
        else {},
        require_encryption=True,
    )
    if not (security.tls_ca_file and security.tls_client_cert):
        raise ConfigurationError(
            f"{address} wants a certificate: give --tls-ca-file, --tls-cert and --tls-key, or name "
            f"them in Dask's configuration (DASK_CONFIG); cluster/certificate.sh makes them"
        )
    try:
        security.get_connection_args("client")
    except OSError as error:  # ssl.SSLError among them
        raise ConfigurationError(f"the certificates cannot be used: {error}") from None
    return security


def check_allowed(whose: str, address: str, options: ConvertOptions) -> None:
    """Refuse an address that others can reach and listen to.

    Raises
    ------
    ConfigurationError
        It is neither encrypted nor of this machine alone, and that was not allowed.
    """
    if options.allow_insecure_cluster or is_encrypted(address) or is_loopback(address):
        return
    raise ConfigurationError(
        f"the {whose} at {address} is beyond this machine and not encrypted: whoever reaches it "
        f"can run programs there; use tls:// with certificates (cluster/certificate.sh makes "
        f"them), or --allow-insecure-cluster on a network that nobody else is on"
    )


def is_encrypted(address: str) -> bool:
    """Whether all that is said to an address is encrypted, with certificates on both sides."""
    return address.partition("://")[0] in _ENCRYPTED


def is_loopback(address: str) -> bool:
    """Whether an address can be reached from this machine only."""
    host = address.rpartition("://")[2].rpartition(":")[0].strip("[]")
    try:
        found = {info[4][0] for info in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    return bool(found) and all(ip_address(str(ip).partition("%")[0]).is_loopback for ip in found)
