"""Makes a store as Ollama leaves it on the disk."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

_LAYER = "application/vnd.ollama.image."


def add_model(
    root: Path, name: str, *layers: tuple[str, bytes | str | dict[str, Any] | list[Any]], **config: Any
) -> Path:
    """`name` is <host>/<namespace>/<model>/<tag>, the first two left out for Ollama's own; `layers` are (kind, content)
    with kinds such as "model" and "params". The manifest's path."""
    parts = ["registry.ollama.ai", "library"][: 4 - len(name.split("/"))] + name.split("/")
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
        "config": _blob(root, "application/vnd.docker.container.image.v1+json", {"model_format": "gguf", **config}),
        "layers": [_blob(root, _LAYER + kind, content) for kind, content in layers],
    }
    path = root.joinpath("manifests", *parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(manifest))
    return path


def blob(root: Path, content: bytes | str) -> Path:
    data = content.encode() if isinstance(content, str) else content
    return root / "blobs" / f"sha256-{hashlib.sha256(data).hexdigest()}"


def _blob(root: Path, media_type: str, content: bytes | str | dict[str, Any] | list[Any]) -> dict[str, Any]:
    text = json.dumps(content) if isinstance(content, (dict, list)) else content
    data = text.encode() if isinstance(text, str) else text
    path = blob(root, data)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return {"mediaType": media_type, "digest": f"sha256:{hashlib.sha256(data).hexdigest()}", "size": len(data)}
