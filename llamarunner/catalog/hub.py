"""Hugging Face, for what its registry protocol does not give: a file by its name (`hf.co/org/repo/model-Q4_K_M.gguf`),
models split into several files, and repositories that want a token.

huggingface-hub says what there is, where and with which digests, and knows the user's token; it is imported only when
it is asked. The bytes come as those of any registry do: in parts, resumed, shared and verified.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import aiohttp

from llamarunner.catalog.catalog import ModelDetails
from llamarunner.catalog.create import config_blob, manifest_bytes
from llamarunner.catalog.files import SUFFIX, Split
from llamarunner.catalog.gguf import printable
from llamarunner.catalog.library import Library
from llamarunner.catalog.manifests import CONFIG_TYPE, MODEL, PROJECTOR, Layer
from llamarunner.catalog.names import DEFAULT_TAG, InvalidNameError, ModelName
from llamarunner.catalog.registry import HUB_HOSTS, RegistryError, check_status

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_ENDPOINT = "https://huggingface.co"  # where hf.co leads to, but a token is not taken along
_ASK_S = 20.0
_MAX_TAG = 80
_NO_TAG_LETTER = re.compile(r"[^A-Za-z0-9_.-]+")
_USUAL = "Q4_K_M"
_PREFERRED_PROJECTORS = ("f16", "bf16")


@dataclass(frozen=True, slots=True)
class HubFile:
    path: str  # in its repository
    size: int
    sha256: str


def parse_file(text: str) -> tuple[ModelName, str] | None:
    """The model's name in our library, and the path in its repository, where `text` names a file of Hugging Face.
    Raises InvalidNameError."""
    host, _, path = text.partition("/")
    parts = path.split("/")
    if host.lower() not in HUB_HOSTS or len(parts) < 3 or not path.lower().endswith(SUFFIX):
        return None
    if any(part in ("", ".", "..") for part in parts):
        raise InvalidNameError
    split = Split.of(parts[-1])
    stem = split.stem if split else parts[-1][: -len(SUFFIX)]
    tag = _NO_TAG_LETTER.sub("-", stem).strip("-.")[-_MAX_TAG:].lstrip("-.")
    return ModelName(host, parts[0], parts[1], tag), "/".join(parts[2:])


def choose(files: Iterable[HubFile], wanted: str) -> list[tuple[str, HubFile]]:
    """What `wanted` means, a file's path or a quantisation ("Q4_K_M", "latest" for the usual one), with the type of
    each layer. All parts of a split model; for a quantisation its projector as well. Raises RegistryError where there
    is nothing of the kind. Pure."""
    by_path = {file.path: file for file in files if file.path.lower().endswith(SUFFIX)}
    if wanted in by_path:
        return [(MODEL, by_path[path]) for path in _all_parts(wanted, by_path)]
    models = [path for path in sorted(by_path) if "mmproj" not in path.lower() and _first(path)]
    tagged = [path for path in models if _has_tag(path, _USUAL if wanted == DEFAULT_TAG else wanted)]
    if not tagged and wanted == DEFAULT_TAG:
        tagged = models[:1]
    if not tagged:
        raise RegistryError("pull model manifest: file does not exist")
    chosen = [(MODEL, by_path[path]) for path in _all_parts(min(tagged, key=len), by_path)]
    projectors = sorted((path for path in by_path if "mmproj" in path.lower()), key=_liking)
    return [*chosen, *((PROJECTOR, by_path[path]) for path in projectors[:1])]


def _first(path: str) -> bool:
    split = Split.of(path.rpartition("/")[2])
    return split is None or split.part == 1


def _has_tag(path: str, tag: str) -> bool:
    split = Split.of(path.rpartition("/")[2])
    stem = split.stem if split else path.rpartition("/")[2][: -len(SUFFIX)]
    return re.search(rf"(^|[-._]){re.escape(tag)}$", stem, re.IGNORECASE) is not None


def _all_parts(path: str, by_path: dict[str, HubFile]) -> list[str]:
    folder, slash, name = path.rpartition("/")
    split = Split.of(name)
    if split is None:
        return [path]
    parts = [f"{folder}{slash}{split.name(part)}" for part in range(1, split.total + 1)]
    if missing := [part for part in parts if part not in by_path]:
        raise RegistryError(f"{len(missing)} of {len(parts)} parts of this model are missing, {missing[0]} for one")
    return parts


def _liking(path: str) -> tuple[int, str]:
    for rank, kind in enumerate(_PREFERRED_PROJECTORS):
        if re.search(rf"(^|[-._]){kind}(?=[-._])", path, re.IGNORECASE):
            return rank, path
    return len(_PREFERRED_PROJECTORS), path


class Hub:
    """The Origin of one model, `wanted` as `choose` has it."""

    def __init__(self, session: aiohttp.ClientSession, library: Library, name: ModelName, wanted: str) -> None:
        self._session = session
        self._library = library
        self._name = name
        self._repo = f"{name.namespace}/{name.model}"
        self._wanted = wanted
        self._urls: dict[str, str] = {}  # by digest
        self._token: str | None = None

    async def manifest(self) -> bytes:
        return await asyncio.to_thread(self._manifest)

    def _manifest(self) -> bytes:
        from huggingface_hub import HfApi, get_token, hf_hub_url

        endpoint = os.environ.get("HF_ENDPOINT", _ENDPOINT).rstrip("/")
        self._token = get_token()
        revision, files = self._look(HfApi(endpoint=endpoint, token=self._token or False))
        chosen = choose(files, self._wanted)
        layers = []
        for media_type, file in chosen:
            part = file.path.rpartition("/")[2]
            layer = Layer(media_type, f"sha256:{file.sha256}", file.size, part if Split.of(part) else "")
            self._urls[layer.digest] = hf_hub_url(self._repo, file.path, revision=revision, endpoint=endpoint)
            layers.append(layer)
        config, _ = self._library.put_blob(config_blob(ModelDetails(), layers), CONFIG_TYPE)
        return manifest_bytes(config, layers)

    def _look(self, api: HfApi) -> tuple[str | None, list[HubFile]]:
        """The revision there is now, and its files. Raises RegistryError."""
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

        try:
            info = api.model_info(self._repo, files_metadata=True, timeout=_ASK_S)
        except GatedRepoError:
            hint = f"accept its conditions at https://{HUB_HOSTS[0]}/{self._repo}, and set HF_TOKEN"
            raise RegistryError(f"{self._repo} is given only to who accepted its conditions", hint=hint) from None
        except RepositoryNotFoundError:
            hint = "" if self._token else "a private one wants HF_TOKEN"
            raise RegistryError("pull model manifest: file does not exist", hint=hint) from None
        except Exception as error:
            said = printable(str(error).strip().partition("\n")[0], 200)
            raise RegistryError(f"Hugging Face cannot be asked: {said}", hint="is this machine online?") from error
        files = [
            HubFile(file.rfilename, file.lfs.size, file.lfs.sha256)
            for file in info.siblings or ()
            if file.lfs is not None and re.fullmatch(r"[0-9a-f]{64}", file.lfs.sha256)
        ]
        return info.sha, files

    @asynccontextmanager
    async def blob(self, digest: str, start: int, end: int) -> AsyncIterator[aiohttp.ClientResponse]:
        """aiohttp takes no token along to the host that the bytes come from."""
        headers = {"Range": f"bytes={start}-{end - 1}"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        async with self._session.get(self._urls[digest], headers=headers, max_redirects=5) as response:
            await check_status(response)
            yield response
