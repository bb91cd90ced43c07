"""What only Ollama's cloud has, refused in its own words. Pure."""

from __future__ import annotations

from aiohttp import web
from aiohttp.typedefs import Handler

from llamarunner.proxies.dialect import json_response
from llamarunner.proxies.proxy import route

_REFUSED = (
    ("POST", "/api/signout", "signing out"),
    ("DELETE", "/api/user/keys/{key}", "keys"),
    ("POST", "/api/experimental/web_search", "web search"),
    ("POST", "/api/experimental/web_fetch", "web fetch"),
    ("GET", "/api/experimental/model-recommendations", "model recommendations"),
)


def cloud_routes() -> list[web.RouteDef]:
    refused = [each for method, path, what in _REFUSED for each in route(method, path, _refuse(what))]
    return [*route("GET", "/api/status", _status), *route("POST", "/api/me", _me), *refused]


async def _status(_request: web.Request) -> web.Response:
    return json_response({"cloud": {"disabled": True, "source": "env"}})


async def _me(_request: web.Request) -> web.Response:
    return json_response({"error": "account unavailable"}, 503)


def _refuse(what: str) -> Handler:
    async def refuse(_request: web.Request) -> web.Response:
        return json_response({"error": f"ollama cloud is disabled: {what} is unavailable"}, 403)

    return refuse
