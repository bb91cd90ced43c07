"""Who is let in by the Host and Origin headers and by the key."""

from __future__ import annotations

import socket

import pytest

from llamarunner.proxies.guard import Guard, host_name

LOCAL = Guard("127.0.0.1", allowed_hosts=["box.lan"])


@pytest.mark.parametrize(
    "host",
    [
        "localhost", "localhost:11434", "LOCALHOST", "localhost.", "a.localhost:1", "127.0.0.1", "127.0.0.1:11434",
        "127.0.0.2:80", "[::1]", "[::1]:1234", "box.lan", "BOX.lan:99", socket.gethostname(),
        "box.local", "host.docker.internal:11434", "ollama.internal.", "10.0.0.1", "192.168.1.1:11434", "0.0.0.0",
        "[fe80::1]", "[fd00::5]:1234",
    ],
)  # fmt: skip
def test_names_of_this_machine_are_admitted(host: str) -> None:
    assert LOCAL.admits_host([host])


@pytest.mark.parametrize(
    "host",
    [
        "", " ", "evil.com", "127.0.0.1.evil.com", "localhost.evil.com", "evil.com:11434", "localhost@evil.com",
        "evil.com/localhost", "127.0.0.1 evil.com", "127.0.0.1,evil.com", "2130706433", "0x7f000001", "127.1",
        "8.8.8.8", "[2600::1]:11434", "local", "internal", "evil.local.com", "xlocal",
        "[::1", "[::1]x", "localhost:port", "localhost:80:80",
        "box.lan.evil.com", "notlocalhost", "evil\\localhost", "localhost\tevil.com", "fe80::1", "\x00localhost",
    ],
)  # fmt: skip
def test_other_names_are_refused(host: str) -> None:
    assert not LOCAL.admits_host([host])


def test_exactly_one_host_header() -> None:
    assert not LOCAL.admits_host([])
    assert not LOCAL.admits_host(["localhost", "localhost"])


def test_listening_everywhere_admits_addresses_but_no_foreign_names() -> None:
    everywhere = Guard("0.0.0.0")
    assert everywhere.admits_host(["192.168.1.20:11434"])
    assert not everywhere.admits_host(["evil.com"])


@pytest.mark.parametrize(
    ("origin", "admitted"),
    [
        ("http://localhost:3000", True), ("https://127.0.0.1", True), ("http://[::1]:8080", True),
        ("http://0.0.0.0:3000", True), ("app://obsidian.md", True), ("tauri://localhost", True),
        ("vscode-webview://x", True), ("https://chat.example", True), ("https://evil.com", False),
        ("http://localhost.evil.com", False), ("null", False), ("https://chat.example.evil.com", False),
        ("http://chat.example", False), ("", False), ("chrome-extension://abc", False),
        ("http://[::1", False), ("http://localhost@evil.com", False),
    ],
)  # fmt: skip
def test_origins(origin: str, admitted: bool) -> None:
    assert Guard("127.0.0.1", cors_origins=["https://chat.example"]).admits_origin(origin) is admitted


@pytest.mark.parametrize(
    ("pattern", "origin", "admitted"),
    [
        ("chrome-extension://*", "chrome-extension://abcdef", True), ("chrome-extension://*", "https://x", False),
        ("http://192.168.1.*", "http://192.168.1.7:3000", True), ("http://192.168.1.*", "http://192.168.11.7", False),
        ("https://*.b.com", "https://a.b.com", True), ("https://*.b.com", "https://b.com", False),
        ("https://a.example", "https://aXexample", False), ("http://[::5]:80", "http://[::5]:80", True),
    ],
)  # fmt: skip
def test_a_part_of_an_origin_may_be_anything(pattern: str, origin: str, admitted: bool) -> None:
    assert Guard("127.0.0.1", cors_origins=[pattern]).admits_origin(origin) is admitted


@pytest.mark.parametrize("origin", ["app://a", "file://", "tauri://b", "vscode-webview://c", "vscode-file://d"])
def test_desktop_programs_are_admitted(origin: str) -> None:
    assert Guard("127.0.0.1").admits_origin(origin)


def test_any_origin_only_where_it_is_asked_for() -> None:
    assert Guard("127.0.0.1", cors_origins=["*"]).admits_origin("https://evil.com")


def test_the_key_is_demanded_where_there_is_one() -> None:
    keyed = Guard("127.0.0.1", api_key="sk-secret")
    assert keyed.admits_key("Bearer sk-secret", "")
    assert keyed.admits_key("bearer  sk-secret ", "")
    assert keyed.admits_key("", "sk-secret")
    for wrong in ("", "Bearer", "Bearer sk-secre", "Basic sk-secret", "sk-secret"):
        assert not keyed.admits_key(wrong, "")
    assert not keyed.admits_key("Bearer wrong", "sk-secret"), "a wrong bearer is not overlooked"
    assert LOCAL.admits_key("Bearer anything", ""), "without a key of ours, any is ignored"


def test_host_name() -> None:
    assert host_name("EXAMPLE.com.:80") == "example.com"
    assert host_name("[2001:db8::1]:80") == "2001:db8::1"
