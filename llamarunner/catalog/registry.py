"""The protocol by which Ollama's registry, and Hugging Face in its manner, hand out models.

GET /v2/<namespace>/<model>/manifests/<tag>
GET /v2/<namespace>/<model>/blobs/<digest>     which mostly redirects to another host
"""

from __future__ import annotations

import asyncio
import os
import platform
import re
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol
from urllib.parse import urlsplit

import aiohttp
import orjson

from llamarunner import __version__
from llamarunner.catalog.gguf import printable
from llamarunner.catalog.manifests import MANIFEST_TYPE, MAX_MANIFEST
from llamarunner.catalog.names import DEFAULT_HOST, ModelName
from llamarunner.errors import LlamaRunnerError

HUB_HOSTS = ("hf.co", "huggingface.co")
_SPEAKS = "0.30.1"  # the Ollama release that registries take us for: some models ask for a certain age
_RETRIES = 3  # of a manifest
_ERROR_BYTES = 2000
_CHALLENGE = re.compile(r'(\w+)="([^"]*)"')


class RegistryError(LlamaRunnerError):
    """`is_final`: asking again would not help. `retry_after_s` is the wait the registry wants, if it says."""

    code = "registry"

    def __init__(
        self, message: str, *, hint: str = "", is_final: bool = True, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message, hint=hint)
        self.is_final = is_final
        self.retry_after_s = retry_after_s


class Origin(Protocol):
    """Where a model comes from."""

    async def manifest(self) -> bytes:
        """Raises RegistryError."""
        ...

    def blob(self, digest: str, start: int, end: int) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        """The bytes from `start` until before `end` (status 206), or the whole blob (200). Raises RegistryError."""
        ...


def download_session() -> aiohttp.ClientSession:
    """For the world outside: by the proxies of the environment, with no deadline but for connecting."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=30),
        headers={
            "User-Agent": f"ollama/{_SPEAKS} ({platform.machine()} linux) LlamaRunner/{__version__}",
            "Accept-Encoding": "identity",
        },
        cookie_jar=aiohttp.DummyCookieJar(),
        trust_env=True,
    )


class Registry:
    """The Origin of one model. `insecure` is http in the place of https, for registries of one's own."""

    def __init__(self, session: aiohttp.ClientSession, name: ModelName, *, insecure: bool = False) -> None:
        self._session = session
        self._name = name
        self._base = f"{base_url(name.host, insecure=insecure)}/v2/{name.namespace}/{name.model}"
        self._token = ""

    async def manifest(self) -> bytes:
        url = f"{self._base}/manifests/{self._name.tag}"
        for attempt in range(_RETRIES + 1):
            try:
                async with asyncio.timeout(60), self._get(url, {"Accept": MANIFEST_TYPE}) as response:
                    data = await response.content.read(MAX_MANIFEST + 1)
                    while block := await response.content.read(MAX_MANIFEST + 1):
                        data += block
                        if len(data) > MAX_MANIFEST:
                            raise RegistryError("pull model manifest: it is too large to be one")
                    return data
            except RegistryError as error:
                if error.is_final or attempt == _RETRIES:
                    raise RegistryError(f"pull model manifest: {error.message}", hint=error.hint) from error
                await asyncio.sleep(2.0**attempt if error.retry_after_s is None else error.retry_after_s)
            except (aiohttp.ClientError, TimeoutError, ValueError) as error:
                raise RegistryError(
                    f"pull model manifest: {self._name.host} cannot be asked: {str(error) or 'no answer in time'}",
                    hint="is this machine online?",
                ) from error
        raise AssertionError("unreachable")

    @asynccontextmanager
    async def blob(self, digest: str, start: int, end: int) -> AsyncIterator[aiohttp.ClientResponse]:
        async with self._get(f"{self._base}/blobs/{digest}", {"Range": f"bytes={start}-{end - 1}"}) as response:
            yield response

    @asynccontextmanager
    async def _get(self, url: str, headers: dict[str, str]) -> AsyncIterator[aiohttp.ClientResponse]:
        """Answers with a status below 300. aiohttp follows redirects, and takes no Authorization along to another
        origin."""
        for has_asked_for_token in (False, True):
            authorization = {"Authorization": f"Bearer {self._token}"} if self._token else {}
            async with self._session.get(url, headers={**headers, **authorization}, max_redirects=5) as response:
                if response.status == 401 and not has_asked_for_token and not response.history:
                    challenge = response.headers.get("WWW-Authenticate", "")
                else:
                    await check_status(response)
                    yield response
                    return
            self._token = await self._authenticate(challenge)

    async def _authenticate(self, challenge: str) -> str:
        """A token for anyone who asks, or the user's own of Hugging Face. Raises RegistryError where there is none."""
        if self._name.host.lower() in HUB_HOSTS and (token := await asyncio.to_thread(_hub_token)):
            return token
        fields = dict(_CHALLENGE.findall(challenge))
        realm = fields.get("realm", "")
        if not challenge.lower().startswith("bearer ") or not realm:
            raise _unauthorized(self._name)
        if _origin(realm) != _origin(self._base):  # or anyone could send us anywhere
            raise RegistryError(f"{self._name.host} sends us to another host for a token ({printable(realm, 100)})")
        query = {key: fields[key] for key in ("service", "scope") if key in fields}
        async with self._session.get(realm, params=query, allow_redirects=False) as response:
            raw = await response.content.read(64 * 1024)
            if response.status != 200:
                raise _unauthorized(self._name)
        try:
            answer = orjson.loads(raw)
            token = answer.get("token") or answer["access_token"]
        except (orjson.JSONDecodeError, KeyError, AttributeError):
            token = None
        if not isinstance(token, str) or not token.isprintable():
            raise _unauthorized(self._name)
        return token


def _hub_token() -> str | None:
    """The user's own, from the environment or from where `hf auth login` left it."""
    from huggingface_hub import get_token  # no part of the start: it takes a moment to load

    token: str | None = get_token()
    return token


def base_url(host: str, *, insecure: bool) -> str:
    """The public hosts are never asked without encryption."""
    if host.lower() in HUB_HOSTS:
        return os.environ.get("HF_ENDPOINT", f"https://{HUB_HOSTS[0]}").rstrip("/")
    return f"http://{host}" if insecure and host.lower() != DEFAULT_HOST else f"https://{host}"


async def check_status(response: aiohttp.ClientResponse) -> None:
    """Raises RegistryError for what is no answer."""
    if response.status < 300:
        return
    if response.status == 404:
        raise RegistryError("file does not exist")
    raw = await response.content.read(_ERROR_BYTES)
    said = printable(_message(raw), 300)
    words = f"{response.status}: {said}" if said else f"the registry answered with status {response.status}"
    hint = "private models are not supported" if response.status == 401 else ""
    # where another host gave the bytes, its address has run out: the next attempt gets a new one
    is_final = response.status < 500 and response.status not in (408, 429) and not response.history
    raise RegistryError(words, hint=hint, is_final=is_final, retry_after_s=_retry_after(response))


def _message(raw: bytes) -> str:
    """The text in a registry's JSON; of a page, nothing."""
    try:
        parsed = orjson.loads(raw)
        found = parsed.get("error") or parsed["errors"][0]["message"]
        return str(found)
    except orjson.JSONDecodeError:
        text = raw.decode("utf-8", "replace").strip()
        return "" if text.startswith("<") else text
    except (KeyError, IndexError, TypeError, AttributeError):
        return ""


def _retry_after(response: aiohttp.ClientResponse) -> float | None:
    text = response.headers.get("Retry-After", "")
    return min(float(text), 60.0) if text.isascii() and text.isdigit() else None


def _origin(url: str) -> tuple[str, str | None, int | None]:
    try:
        parts = urlsplit(url)
        return parts.scheme, parts.hostname, parts.port
    except ValueError:
        return "", None, None


def _unauthorized(name: ModelName) -> RegistryError:
    hint = "private models are not supported"
    if name.host.lower() in HUB_HOSTS:
        hint = "set HF_TOKEN to a token that may read it"
    return RegistryError(f"{name.host} does not let just anyone have {name.short}", hint=hint)
