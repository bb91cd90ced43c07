"""Whom a request is recognised as."""

from __future__ import annotations

import pytest

from llamarunner.config.schema import ClientConfig
from llamarunner.proxies.clients import Clients
from llamarunner.proxies.guard import Guard

CLIENTS = Clients(
    {
        "alice": ClientConfig.model_validate({"api_key": "alice's-key", "priority": 5}),
        "office": ClientConfig.model_validate({"addresses": ["10.1.0.0/16", "fd00::/8"]}),
        "both": ClientConfig.model_validate({"api_key": "k", "addresses": ["192.168.1.20"], "priority": -1}),
    }
)


@pytest.mark.parametrize(
    ("key", "address", "name"),
    [
        ("alice's-key", "127.0.0.1", "alice"),
        ("alice's-key", "10.1.2.3", "alice"),  # the key says more than the address
        ("wrong", "10.1.2.3", "office"),
        ("", "10.1.255.255", "office"),
        ("", "10.2.0.1", None),
        ("", "fd12::1", "office"),
        ("", "::ffff:10.1.2.3", "office"),
        ("", "192.168.1.20", "both"),
        ("k", "", "both"),
        ("", "", None),
        ("kö", "no address", None),
    ],
)
def test_by_its_key_and_else_by_its_address(key: str, address: str, name: str | None) -> None:
    found = CLIENTS.recognise(key, address)
    assert (found.name if found is not None else None) == name


def test_the_key_of_a_client_opens_a_proxy_that_demands_one() -> None:
    guard = Guard("127.0.0.1", api_key="the proxy's", client_keys=CLIENTS.keys)
    assert guard.admits_key("Bearer alice's-key", "")
    assert guard.admits_key("", "k")
    assert guard.admits_key("Bearer the proxy's", "")
    assert not guard.admits_key("Bearer other", "")
    assert not guard.admits_key("", "")


def test_without_a_key_of_its_own_a_proxy_demands_none() -> None:
    assert Guard("127.0.0.1", client_keys=CLIENTS.keys).admits_key("", "")
