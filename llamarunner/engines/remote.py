"""A server of OpenAI's API that runs already, here or elsewhere: no process, no memory of ours. Asks it which models it
has, which is its health check as well. Its key is in one header and nowhere else, and redirects are not followed."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Collection, Iterable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import orjson

from llamarunner import __version__
from llamarunner.catalog.catalog import Capability, Model, ModelDetails, name_key
from llamarunner.catalog.gguf import printable
from llamarunner.config.schema import EngineConfig, ModelSettings
from llamarunner.engines.engine import EngineInfo, LaunchPlan
from llamarunner.errors import EngineError, EngineMissingError
from llamarunner.units import format_duration

KIND = "remote"
MODELS_PATH = "/v1/models"
ASK_S = 10.0

_BODY_BYTES = 4 * 1024**2  # the longest lists, with prices and descriptions, have 1 MiB
_MOST_MODELS = 1000
_LONGEST_ID = 200
_LONGEST_REASON = 200
_MOST_NUMBERED = 100
_NOT_OPENAI = "is it the address of a server of OpenAI's API?"
_CHAT = frozenset({Capability.COMPLETION, Capability.TOOLS})
_EMBEDDING = frozenset({Capability.EMBEDDING})


class UnreachableError(EngineError):
    """A server that should be there is not, or does not let us in."""

    status = 503
    code = "engine_unreachable"


class RemoteEngine:
    kind = KIND
    is_local = False
    is_adjustable = False

    def __init__(self, name: str, config: EngineConfig) -> None:
        self.name = name
        self._config = config

    @property
    def known_version(self) -> str:
        return ""

    def info(self) -> EngineInfo:
        url = base_url(self._config)
        try:
            models = asyncio.run(_list_alone(self._config))
        except EngineError as error:
            return EngineInfo(self.name, KIND, url, problem=f"engine '{self.name}': {error.message}", hint=error.hint)
        return EngineInfo(self.name, KIND, url, version=f"{len(models)} model{'' if len(models) == 1 else 's'}")

    def project(self, model: Model) -> None:
        return None

    def plan(self, model: Model, *, port: int, api_key: str) -> LaunchPlan:
        url = base_url(self._config)
        if not url:
            raise EngineMissingError(f"engine '{self.name}' has no url", hint=f"set engines.{self.name}.url")
        return LaunchPlan(
            argv=(),
            port=0,
            api_key=_key(self._config),
            health_path=MODELS_PATH,
            load_timeout_s=model.settings.load_timeout,
            supports_tools=self._config.supports_tools,
            url=url,
            served_model=str(model.path),
            is_llama_cpp=False,
        )


def base_url(config: EngineConfig) -> str:
    """Without /v1, which our requests begin with."""
    return (config.url or "").rstrip("/").removesuffix("/v1").rstrip("/")


async def list_models(session: aiohttp.ClientSession, config: EngineConfig) -> tuple[str, ...]:
    """What the server calls its models. Raises UnreachableError."""
    headers = {"Authorization": f"Bearer {key}"} if (key := _key(config)) else {}
    return await ask_models(session, base_url(config), headers, ASK_S)


def models_of(engine: str, ids: Iterable[str], defaults: ModelSettings, taken: Collection[str]) -> list[Model]:
    """The catalogue's entries for a server's models: each under its name there, or `engine/name` where that is one of
    the names `taken`."""
    settings = defaults.model_copy(update={"engine": engine})
    names = {name_key(name) for name in taken}
    models = []
    for served in ids:
        if name := _free_name(engine, served, names):
            names.add(name_key(name))
            # all that is known is the name, and by it embedding models are called everywhere
            capabilities = _EMBEDDING if "embed" in served.lower() else _CHAT
            details = ModelDetails(capabilities=capabilities)
            models.append(Model(name, Path(served), settings, details=details, source=engine, is_remote=True))
    return models


async def ask_models(
    session: aiohttp.ClientSession, url: str, headers: Mapping[str, str], timeout_s: float
) -> tuple[str, ...]:
    """As `list_models`, by the address without /v1."""
    async with _asked(session, url, headers, timeout_s) as response:
        body = bytearray()
        async for block in response.content.iter_chunked(64 * 1024):
            body += block
            if len(body) > _BODY_BYTES:
                raise UnreachableError(f"{url} answers with an endless list of models", hint=_NOT_OPENAI)
    try:
        return model_ids(orjson.loads(body))
    except ValueError:
        raise UnreachableError(f"{url} does not answer with a list of models", hint=_NOT_OPENAI) from None


async def check(session: aiohttp.ClientSession, url: str, headers: Mapping[str, str], timeout_s: float) -> None:
    """Whether it still answers; its list is not read. Raises UnreachableError."""
    async with _asked(session, url, headers, timeout_s):
        pass


def model_ids(answer: Any) -> tuple[str, ...]:
    """Of `{"data": [{"id": ...}]}`, a bare list, or one under "models". What could not be a name is passed over.
    Raises ValueError where there is no list."""
    entries = (answer.get("data") or answer.get("models") or []) if isinstance(answer, dict) else answer
    if not isinstance(entries, list) or (isinstance(answer, dict) and not {"data", "models"} & answer.keys()):
        raise ValueError("not a list of models")
    found: dict[str, None] = {}
    for entry in entries[:_MOST_MODELS]:
        served = (entry.get("id") or entry.get("name")) if isinstance(entry, dict) else entry
        if isinstance(served, str) and _is_usable(served):
            found[served] = None
    return tuple(found)


def _is_usable(served: str) -> bool:
    """As a name, and unchanged as a model's path."""
    return (
        served.isprintable() and len(served) <= _LONGEST_ID and bool(name_key(served)) and str(Path(served)) == served
    )


def _free_name(engine: str, served: str, names: Collection[str]) -> str | None:
    wanted = [served, f"{engine}/{served}", *(f"{engine}/{served}-{number}" for number in range(2, _MOST_NUMBERED))]
    return next((name for name in wanted if name_key(name) not in names), None)


def _key(config: EngineConfig) -> str:
    return config.api_key.get_secret_value() if config.api_key is not None else ""


async def _list_alone(config: EngineConfig) -> tuple[str, ...]:
    async with aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar(), trust_env=False) as session:
        return await list_models(session, config)


@asynccontextmanager
async def _asked(
    session: aiohttp.ClientSession, url: str, headers: Mapping[str, str], timeout_s: float
) -> AsyncIterator[aiohttp.ClientResponse]:
    """The answer to the question for models, once it is known not to be a refusal."""
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    headers = {
        **headers,
        "Accept": "application/json",
        "Accept-Encoding": "identity",  # a small answer may not grow into a large one
        "User-Agent": f"llamarunner/{__version__}",
    }
    try:
        async with session.get(url + MODELS_PATH, headers=headers, timeout=timeout, allow_redirects=False) as response:
            if problem := _problem(response):
                raise UnreachableError(f"{url} {problem[0]}", hint=problem[1])
            yield response
    except TimeoutError:
        hint = "see whether it is overloaded, or the network slow"
        raise UnreachableError(f"{url} did not answer within {format_duration(timeout_s)}", hint=hint) from None
    except (aiohttp.ClientError, OSError) as error:
        hint = "see that it runs and may be reached from this machine"
        raise UnreachableError(f"{url} cannot be reached: {_reason(error)}", hint=hint) from None


def _problem(response: aiohttp.ClientResponse) -> tuple[str, str] | None:
    match response.status:
        case 401 | 403:
            return "does not accept the key", "set the engine's api_key to one that the server knows"
        case status if 300 <= status < 400:
            return "answers with a redirect, which is not followed", "set the engine's url to where it leads"
        case 404:
            return f"has no {MODELS_PATH}", _NOT_OPENAI
        case status if status >= 400:
            return f"answers with status {status}", "see the log of that server"
    if response.content_type == "text/html":
        return "answers with a web page", _NOT_OPENAI
    return None


def _reason(error: Exception) -> str:
    """The system's words where it has some; aiohttp's repeat the address."""
    cause = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
    if not isinstance(cause, OSError) or not cause.errno:
        return printable(str(cause), _LONGEST_REASON) or type(cause).__name__
    return os.strerror(cause.errno) if cause.errno > 0 else str(cause.strerror)  # negative: of the name's look-up
