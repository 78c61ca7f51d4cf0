"""The URL of rows on other hosts: addresses, TLS, the file of the token, the deadline."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError
from .options import flag, split_options

DEADLINE = 10.0
NAMES = ("tls", "ca", "token_file", "deadline", "cache", "warm", "pin")
_HOST = re.compile(r"[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]", re.ASCII)
_TOKEN = re.compile(r"[!-~]+", re.ASCII)


@dataclass(frozen=True)
class RemoteOptions:
    """Where rows of other hosts are read, and how.

    Attributes:
        addresses: HOST:PORT of each server.
        tls: whether connections are encrypted, and servers prove who they are.
        ca: PEM file of the certificates that vouch for servers; None = those of the system.
        token_file: file whose one line is the bearer token; None = no token.
        deadline: seconds that a call may take, with all that it tries.
    """

    addresses: tuple[str, ...]
    tls: bool = False
    ca: str | None = None
    token_file: str | None = None
    deadline: float = DEADLINE

    @classmethod
    def parse(cls, url: object, rest: str) -> tuple[RemoteOptions, dict[str, str]]:
        """Reads HOST:PORT,HOST:PORT?tls=1&... into options, and the values of a cache in front.

        Raises:
            ConfigError: if an address or an option is invalid, or a token would be sent to
                another host without TLS.
        """
        hosts, _, text = rest.partition("?")
        values = split_options(url, text, NAMES)
        addresses = tuple(hosts.split(",")) if hosts else ()
        if not addresses or len(set(addresses)) < len(addresses):
            raise ConfigError(
                f"store {url!r}: expected HOST:PORT,HOST:PORT, each once, found {hosts!r}"
            )
        for address in addresses:
            split_address(address)
        options = cls(
            addresses,
            flag(url, "tls", values.get("tls", "0")),
            values.get("ca"),
            values.get("token_file"),
            _seconds(url, values.get("deadline", str(DEADLINE))),
        )
        if options.ca is not None and not options.tls:
            raise ConfigError(f"store {url!r}: expected tls=1 with ca=")
        if options.token_file is not None and not options.tls:
            for address in addresses:
                if not is_loopback(split_address(address)[0]):
                    raise ConfigError(
                        f"store {url!r}: expected tls=1 with token_file=, since {address} is "
                        "another host, found neither; a token is never sent in the clear"
                    )
        return options, {name: values[name] for name in ("cache", "warm", "pin") if name in values}

    @property
    def scheme(self) -> str:
        """The scheme of a Flight location."""
        return "grpc+tls" if self.tls else "grpc"

    def token(self) -> str | None:
        """The token as it is in the file now. Raises ConfigError if the file has none."""
        return None if self.token_file is None else read_tokens(self.token_file)[0]

    def certificates(self) -> bytes | None:
        """The content of `ca`. Raises ConfigError if it cannot be read."""
        return None if self.ca is None else read_bytes("ca", self.ca)


def split_address(address: str) -> tuple[str, int]:
    """Splits HOST:PORT, or [IPv6]:PORT. Raises ConfigError if it is anything else."""
    host, _, port = address.rpartition(":")
    is_port = port.isascii() and port.isdigit() and len(port) <= 5 and int(port) <= 65_535
    if not is_port or not _HOST.fullmatch(host):
        raise ConfigError(f"address: expected HOST:PORT, found {address!r}")
    return host, int(port)


def is_loopback(host: str) -> bool:
    """Whether a host name or address can only mean this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def read_tokens(path: str | Path) -> list[str]:
    """The tokens of a file, one a line. Messages never show what is in the file.

    Raises:
        ConfigError: if the file cannot be read, has no token, or a line is no token.
    """
    lines = read_bytes("token file", path).decode("ascii", "replace").splitlines()
    tokens = [line.strip() for line in lines if line.strip()]
    if not tokens:
        raise ConfigError(f"token file {path}: expected a token, found an empty file")
    for number, token in enumerate(tokens, start=1):
        if not _TOKEN.fullmatch(token):
            raise ConfigError(
                f"token file {path}: expected one token a line, printable ASCII without blanks; "
                f"token {number} is something else"
            )
    return tokens


def read_bytes(what: str, path: str | Path) -> bytes:
    """The content of a file. Raises ConfigError if it cannot be read."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{what} {path}: expected a file that can be read, found {error.strerror}"
        ) from None


def _seconds(url: object, text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.01 <= seconds <= 3600:
        raise ConfigError(
            f"store {url!r}, deadline: expected seconds from 0.01 to 3600, found {text!r}"
        )
    return seconds
