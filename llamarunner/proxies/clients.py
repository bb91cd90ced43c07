"""Who asks: the [clients.NAME] whose key a request shows, or whose address it comes from."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass

from llamarunner.config.schema import ClientConfig

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True, slots=True)
class Client:
    name: str
    priority: int
    key: str  # "" for none
    networks: tuple[Network, ...]


class Clients:
    def __init__(self, configs: Mapping[str, ClientConfig]) -> None:
        self._all = [_client(name, config) for name, config in configs.items()]

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(client.key for client in self._all if client.key)

    def recognise(self, key: str, address: str) -> Client | None:
        """By its key before its address; `address` is an IP address, or "" where none is known."""
        if key:
            given = key.encode("utf-8", "replace")
            for client in self._all:
                if client.key and hmac.compare_digest(given, client.key.encode()):
                    return client
        if not address or not self._all:
            return None
        try:
            found = ipaddress.ip_address(address)
        except ValueError:
            return None
        mapped = getattr(found, "ipv4_mapped", None) or found
        return next((client for client in self._all if any(mapped in network for network in client.networks)), None)


def _client(name: str, config: ClientConfig) -> Client:
    key = config.api_key.get_secret_value() if config.api_key is not None else ""
    networks = tuple(ipaddress.ip_network(address, strict=False) for address in config.addresses)
    return Client(name, config.priority, key, networks)
