"""A registry of models on two ports of this machine, the second of which gives out the bytes, with every fault that one
may have. `faults` are taken one by one, each by the next request for a blob's bytes:

    status:N    answer with this status          retry-after:N   429, try again after N seconds
    cut:N       break off after N bytes          stall:N         N bytes, then nothing more
    garbage     other bytes than it should       short           fewer bytes, as if that were all
    total       say that the file is longer      shifted         other bytes than were asked for
    whole       ignore the range: 200            slow            some bytes every few milliseconds
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

MANIFEST_TYPE = "application/vnd.docker.distribution.manifest.v2+json"
_IMAGE = "application/vnd.ollama.image."


@dataclass(frozen=True)
class Asked:
    path: str
    range: str
    authorization: str
    port: int
    headers: dict[str, str]


@dataclass
class FakeRegistry:
    blobs: dict[str, bytes] = field(default_factory=dict)
    manifests: dict[str, bytes] = field(default_factory=dict)  # "library/m/latest"
    asked: list[Asked] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    always: str = ""  # a fault of every request
    refused: dict[str, str] = field(default_factory=dict)  # manifests, with what is said of them
    hub: dict[str, dict[str, bytes]] = field(default_factory=dict)  # "org/repo": {path: bytes}
    gated: dict[str, str] = field(default_factory=dict)  # "org/repo": the token it wants
    manifest_faults: list[str] = field(default_factory=list)
    redirects: bool = True
    token: str = ""  # demanded for everything
    token_is_given: bool = True  # to anyone who asks
    realm: str = ""  # where it is to be had; here if ""
    gate: asyncio.Event | None = None  # blobs wait for it
    port: int = 0
    bytes_port: int = 0

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    def add(self, name: str, *, tag: str = "latest", **layers: bytes) -> dict[str, Any]:
        """A model with these layers by kind ("model", "params", ...); its manifest."""
        config = {
            "mediaType": "application/vnd.docker.container.image.v1+json",
            **self._blob(b'{"model_format":"gguf"}'),
        }
        records = [{"mediaType": _IMAGE + kind, **self._blob(data)} for kind, data in layers.items()]
        manifest = {"schemaVersion": 2, "mediaType": MANIFEST_TYPE, "config": config, "layers": records}
        self.manifests[f"library/{name}/{tag}"] = json.dumps(manifest, indent=1).encode()  # to be kept to the letter
        return manifest

    def _blob(self, data: bytes) -> dict[str, Any]:
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        self.blobs[digest] = data
        return {"digest": digest, "size": len(data)}

    def blob_requests(self, digest: str = "") -> list[Asked]:
        """For bytes, not counting those that were sent elsewhere or asked for a token."""
        return [
            each
            for each in self.asked
            if "/blobs/" in each.path and digest in each.path and (each.port == self.bytes_port or not self.redirects)
        ]

    # -- what it answers ---------------------------------------------------------------------------------------------

    async def handle(self, request: web.Request) -> web.StreamResponse:
        port = request.transport.get_extra_info("sockname")[1] if request.transport else 0
        headers = {name.lower(): value for name, value in request.headers.items()}
        self.asked.append(
            Asked(request.path, headers.get("range", ""), headers.get("authorization", ""), port, headers)
        )
        if request.path == "/token":
            if not self.token_is_given:
                return web.Response(status=403)
            return web.json_response({"token": self.token})
        if self.token and port == self.port and headers.get("authorization") != f"Bearer {self.token}":
            realm = self.realm or f"http://{self.host}/token"
            challenge = f'Bearer realm="{realm}",service="{self.host}",scope="repository:pull"'
            return web.json_response(
                {"errors": [{"message": "denied"}]}, status=401, headers={"WWW-Authenticate": challenge}
            )
        if request.path.startswith("/api/models/"):
            return self._repository(request)
        if "/resolve/" in request.path:
            return await self._hub_file(request, port)
        _, _, namespace, model, kind, last = request.path.split("/")
        if kind == "manifests":
            return self._manifest(f"{namespace}/{model}/{last}")
        if last not in self.blobs:
            return web.json_response({"errors": [{"message": "unknown blob"}]}, status=404)
        if self.redirects and port == self.port:
            raise web.HTTPTemporaryRedirect(f"http://127.0.0.1:{self.bytes_port}{request.path}")
        return await self._bytes(request, self.blobs[last])

    # -- as Hugging Face -----------------------------------------------------------------------------------------------

    def _repository(self, request: web.Request) -> web.Response:
        repo = request.path.removeprefix("/api/models/").split("/revision/")[0]
        if repo in self.gated and request.headers.get("Authorization") != f"Bearer {self.gated[repo]}":
            return web.json_response(
                {"error": "Access to it is restricted"}, status=403, headers={"X-Error-Code": "GatedRepo"}
            )
        if repo not in self.hub:
            return web.json_response(
                {"error": "Repository not found"}, status=404, headers={"X-Error-Code": "RepoNotFound"}
            )
        siblings = [
            {
                "rfilename": path,
                "size": len(data),
                "blobId": "0" * 40,
                "lfs": {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134},
            }
            for path, data in self.hub[repo].items()
        ]
        siblings.append({"rfilename": "README.md", "size": 3, "blobId": "0" * 40})
        return web.json_response({"id": repo, "modelId": repo, "sha": "c0ffee", "tags": [], "siblings": siblings})

    async def _hub_file(self, request: web.Request, port: int) -> web.StreamResponse:
        repo, _, rest = request.path.removeprefix("/").partition("/resolve/")
        revision, _, path = rest.partition("/")
        assert revision == "c0ffee"
        if port == self.port:
            if repo in self.gated:
                assert request.headers["Authorization"] == f"Bearer {self.gated[repo]}"
            raise web.HTTPFound(f"http://127.0.0.1:{self.bytes_port}{request.path}")
        return await self._bytes(request, self.hub[repo][path])

    # -- as Ollama's ---------------------------------------------------------------------------------------------------

    def _manifest(self, key: str) -> web.Response:
        if self.manifest_faults:
            fault, _, value = self.manifest_faults.pop(0).partition(":")
            if fault == "status":
                return web.Response(status=int(value), text="<html>no</html>")
            return web.Response(status=429, headers={"Retry-After": value})
        if key in self.refused:
            return web.json_response({"error": self.refused[key]}, status=400)
        if key not in self.manifests:
            return web.json_response({"errors": [{"message": "manifest unknown"}]}, status=404)
        return web.Response(body=self.manifests[key], content_type=MANIFEST_TYPE)

    async def _bytes(self, request: web.Request, data: bytes) -> web.StreamResponse:
        fault, _, value = (self.faults.pop(0) if self.faults else self.always).partition(":")
        if self.gate is not None:
            await self.gate.wait()
        if fault == "status":
            return web.json_response({"error": "it hurts"}, status=int(value))
        if fault == "retry-after":
            return web.Response(status=429, headers={"Retry-After": value})
        asked = request.http_range
        start, end = asked.start or 0, asked.stop or len(data)
        total = len(data)
        if fault == "total":
            total += 7
        if fault == "shifted":
            start += 1
        headers = {"Content-Range": f"bytes {start}-{end - 1}/{total}"}
        status, part = 206, data[start:end]
        if fault == "whole" or "Range" not in request.headers:
            status, part, headers = 200, data, {}
        if fault == "garbage":
            part = bytes(len(part))
        if fault == "short":
            part = part[: len(part) // 2]
        response = web.StreamResponse(status=status, headers={**headers, "Content-Length": str(len(part))})
        await response.prepare(request)
        if fault in ("cut", "stall"):
            await response.write(part[: int(value)])
            if fault == "stall":
                await asyncio.sleep(60)
            assert request.transport is not None
            await asyncio.sleep(0.02)  # so that they are on their way
            request.transport.abort()
            return response
        if fault == "slow":
            for position in range(0, len(part), 4096):
                await response.write(part[position : position + 4096])
                await asyncio.sleep(0.03)
        else:
            await response.write(part)
        await response.write_eof()
        return response


@asynccontextmanager
async def serve_registry() -> AsyncIterator[FakeRegistry]:
    registry = FakeRegistry()
    application = web.Application()
    application.router.add_route("*", "/{path:.*}", registry.handle)
    runner = web.AppRunner(application, shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    try:
        for _ in range(2):
            await web.TCPSite(runner, "127.0.0.1", 0).start()
        registry.port, registry.bytes_port = (address[1] for address in runner.addresses)
        yield registry
    finally:
        await runner.cleanup()
