"""Models that LM Studio downloaded: <models>/<publisher>/<repository>/<file>.gguf, and the entries of its hub, which
are names for them. Blocks.
"""

from __future__ import annotations

import logging
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import orjson

from llamarunner.catalog.catalog import Capability, ModelDetails
from llamarunner.catalog.files import Files, projectors_of
from llamarunner.catalog.folders import names_within
from llamarunner.catalog.found import Found
from llamarunner.catalog.gguf import printable
from llamarunner.catalog.quantization import preferred, quantization_in

logger = logging.getLogger(__name__)

SOURCE = "lmstudio"
_MAX_BYTES = 1024**2  # of a file of LM Studio's own
_MAX_ENTRIES = 2000
_BASE = re.compile(r"""^\s*(?:-\s*)?key:\s*["']?([\w.-]+/[\w.-]+)["']?\s*$""", re.MULTILINE)


def lmstudio_home(environ: Mapping[str, str]) -> str:
    """Where LM Studio keeps all that is its own; the folder need not exist."""
    home = environ.get("HOME") or os.path.expanduser("~")
    if pointed := _text(os.path.join(home, ".lmstudio-home-pointer")).strip():
        return pointed
    usual, old = os.path.join(home, ".lmstudio"), os.path.join(home, ".cache", "lm-studio")
    return old if not os.path.isdir(usual) and os.path.isdir(old) else usual


def models(files: Files, home: str) -> Iterator[Found]:
    root = _models_folder(files, home)
    hub = _hub(files, home)
    for group in files.below(root):
        paired = projectors_of(group)
        relative = os.path.relpath(group.folder, root)
        above = () if relative == os.curdir else tuple(relative.split(os.sep))
        chosen = preferred(group.models)
        for path, stem in group.models.items():
            aliases: tuple[str, ...] = ()
            if len(above) == 2:
                details = group.details.get(path, ModelDetails())
                keys = _keys(above, hub, embeds=Capability.EMBEDDING in details.capabilities)
                aliases = tuple(_aliases(keys, stem, is_chosen=path == chosen))
            yield Found(path, names_within(above or (SOURCE,), stem), SOURCE, aliases, mmproj=paired.get(path, ""))


def _keys(above: tuple[str, ...], hub: Mapping[str, list[str]], *, embeds: bool) -> list[str]:
    """What LM Studio calls the models of a repository."""
    publisher, repository = map(printable, above)
    key = re.sub(r"[-_.]gguf$", "", repository.lower())
    if embeds:
        key = f"text-embedding-{key.removeprefix('text-embedding-')}"
    whole = f"{publisher}/{repository}"
    return [key, f"{publisher}/{key}", whole, *hub.get(whole.lower(), ())]


def _aliases(keys: Iterable[str], stem: str, *, is_chosen: bool) -> Iterator[str]:
    """Each with the quantization, and without for the one that LM Studio would take."""
    quantization = quantization_in(stem).lower()
    for key in keys:
        if is_chosen:
            yield key
        if quantization:
            yield f"{key}@{quantization}"


def _models_folder(files: Files, home: str) -> str:
    settings = os.path.join(home, "settings.json")
    files.disk.status(settings)  # so that a change is noticed
    folder = _json(settings).get("downloadsFolder")
    return folder if isinstance(folder, str) and os.path.isabs(folder) else os.path.join(home, "models")


def _hub(files: Files, home: str) -> dict[str, list[str]]:
    """The hub's names (owner/name) of each publisher/repository, in lower case."""
    found: dict[str, list[str]] = defaultdict(list)
    top = os.path.join(home, "hub", "models")
    entries = [
        (owner, name) for owner in files.disk.folders(top) for name in files.disk.folders(os.path.join(top, owner))
    ]
    for owner, name in entries[:_MAX_ENTRIES]:
        folder = os.path.join(top, owner, name)
        for base in sorted(_bases(files, folder)):
            found[base.lower()].append(printable(f"{owner}/{name}"))
    return found


def _bases(files: Files, folder: str) -> set[str]:
    """The repositories that an entry of the hub stands for."""
    manifest, model = os.path.join(folder, "manifest.json"), os.path.join(folder, "model.yaml")
    bases: set[str] = set()
    if files.disk.status(manifest) is not None:
        dependencies = _json(manifest).get("dependencies")
        for dependency in dependencies if isinstance(dependencies, list) else ():
            if isinstance(dependency, dict):
                bases |= set(_repositories(dependency))
    if files.disk.status(model) is not None:
        bases |= set(_BASE.findall(_text(model)))
    return bases


def _repositories(dependency: Mapping[str, Any]) -> Iterator[str]:
    keys, sources = dependency.get("modelKeys"), dependency.get("sources")
    yield from (key for key in (keys if isinstance(keys, list) else ()) if isinstance(key, str) and key.count("/") == 1)
    for source in sources if isinstance(sources, list) else ():
        if isinstance(source, dict) and source.get("user") and source.get("repo"):
            yield f"{source['user']}/{source['repo']}"


def _json(path: str) -> dict[str, Any]:
    text = _text(path)
    try:
        found = orjson.loads(text) if text else {}
    except orjson.JSONDecodeError as error:
        logger.debug("%s: %s", printable(path), error)
        return {}
    return found if isinstance(found, dict) else {}


def _text(path: str) -> str:
    """ "" where it is no file, or cannot be read."""
    if not os.path.isfile(path):
        return ""
    try:
        with Path(path).open("rb") as file:
            return file.read(_MAX_BYTES).decode("utf-8", "replace")
    except OSError as error:
        logger.debug("%s: %s", printable(path), error)
        return ""
