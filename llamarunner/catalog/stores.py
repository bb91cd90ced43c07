"""Discovery: the models of the configuration, and those on the disk, as one catalogue. Blocks: call it in a thread."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from llamarunner import paths
from llamarunner.catalog import huggingface_store, lmstudio_store
from llamarunner.catalog.catalog import Catalog, Model, name_key
from llamarunner.catalog.describe import configured, discovered, with_projector
from llamarunner.catalog.disk import Disk
from llamarunner.catalog.files import Files
from llamarunner.catalog.folders import models_below
from llamarunner.catalog.found import Found
from llamarunner.catalog.gguf import printable
from llamarunner.catalog.headers import HeaderCache
from llamarunner.catalog.library import library_root
from llamarunner.catalog.ollama_store import OllamaStore, ollama_folders
from llamarunner.config.schema import Config

logger = logging.getLogger(__name__)


def discover(
    config: Config, *, headers: HeaderCache | None = None, environ: Mapping[str, str] | None = None
) -> Catalog:
    """The models there are now."""
    return Discovery(config, headers=headers, environ=environ).look()


def kept_headers(*, writes: bool = True) -> HeaderCache:
    """Of this user, from run to run."""
    return HeaderCache(paths.cache_dir() / "headers", writes=writes)


def places(config: Config) -> list[str]:
    """Where models are looked for, as text."""
    found = config.discovery
    others = {"Ollama": found.ollama, "LM Studio": found.lmstudio, "Hugging Face's cache": found.huggingface}
    return [*(printable(str(folder)) for folder in found.folders), *(name for name, is_on in others.items() if is_on)]


class Discovery:
    """Looks again and again: what did not change costs little."""

    def __init__(
        self, config: Config, *, headers: HeaderCache | None = None, environ: Mapping[str, str] | None = None
    ) -> None:
        self._config = config
        self._environ = os.environ if environ is None else environ
        self._headers = HeaderCache() if headers is None else headers
        self._disk = Disk()
        self._catalog: Catalog | None = None
        self._stores = [OllamaStore(str(library_root(config)), "library")]
        if config.discovery.ollama:
            self._stores += [OllamaStore(folder, "ollama") for folder in ollama_folders(self._environ)]

    def look(self) -> Catalog:
        """The same object as before where nothing changed."""
        if self._catalog is None:
            self._headers.load()
        elif self._disk.is_unchanged():
            return self._catalog
        self._disk.begin()
        models = self._models(Files(self._disk, self._headers))
        self._headers.save()
        if self._catalog is None or list(self._catalog) != models:
            self._catalog = Catalog(models)
        return self._catalog

    def _models(self, files: Files) -> list[Model]:
        config = self._config
        models = [configured(name, settings, config, files) for name, settings in config.models.items()]
        own = {self._identity(str(model.path)) for model in models} - {None}
        names = _Names(name for model in models for name in (model.name, *model.aliases))
        by_content: dict[Any, int] = {}
        every = list(self._found(files))
        wanted = Counter(name_key(found.names[0]) for found in every)
        for found in every:
            identity = self._identity(found.path)
            if found.preset is None and identity in own:
                continue  # it has the name that the configuration gave it
            content = self._content(found, identity)
            if (known := by_content.get(content)) is not None:
                models[known] = _merged(models[known], found, names, files)
            elif found.preset is None or names.are_free(found.names[:1]):
                by_content[content] = len(models)
                if found.preset is None and wanted[name_key(found.names[0])] > 1:
                    # a name that stays, whoever comes first
                    found = replace(found, aliases=(*found.aliases, *found.names[-1:]))
                settings = config.models.get(found.origin, config.defaults)  # what was made of a model runs like it
                models.append(discovered(names.take(found.names), found, settings, files))
        models = [replace(model, file_id=self._identity(str(model.path))) for model in models]
        return _without_empty_promises(models)

    def _found(self, files: Files) -> Iterator[Found]:
        """Those first whose names are fixed."""
        discovery = self._config.discovery
        for store in self._stores:
            yield from store.models(self._disk)
        for folder in discovery.folders:
            yield from models_below(files, str(folder))
        if discovery.lmstudio:
            yield from lmstudio_store.models(files, lmstudio_store.lmstudio_home(self._environ))
        if discovery.huggingface:
            yield from huggingface_store.models(files, huggingface_store.huggingface_folder(self._environ))

    def _identity(self, path: str) -> tuple[int, int] | None:
        status = self._disk.status(path) if path else None
        return status.identity if status else None

    def _content(self, found: Found, identity: tuple[int, int] | None) -> Any:
        """The same for what is the same model under two names."""
        if identity is None:
            return found.path or found.names  # what is not there is like nothing else
        if (preset := found.preset) is None:
            return identity
        parts = (found.mmproj, *found.adapters)
        words = (repr(sorted(preset.parameters.items())), preset.system, preset.template, repr(preset.messages))
        return (identity, *(self._identity(part) for part in parts), *words)


def _merged(model: Model, found: Found, names: _Names, files: Files) -> Model:
    """The model with what else it is called, and the projector that lies beside its file in another place."""
    more = found.names[:1] if names.are_free(found.names[:1]) else ()
    for name in more:
        names.take((name,))
    if model.mmproj is None and found.mmproj:
        model = with_projector(model, Path(found.mmproj), files)
    aliases = tuple(dict.fromkeys((*model.aliases, *more, *found.aliases)))
    return model if aliases == model.aliases else replace(model, aliases=aliases)


def _without_empty_promises(models: list[Model]) -> list[Model]:
    """The models without aliases under which another one is found."""
    owner = {name_key(model.name): number for number, model in enumerate(models)}
    for number, model in enumerate(models):
        for alias in model.aliases:
            owner.setdefault(name_key(alias), number)
    kept = []
    for number, model in enumerate(models):
        own = name_key(model.name)
        aliases = tuple(alias for alias in model.aliases if owner[key := name_key(alias)] == number and key != own)
        kept.append(model if aliases == model.aliases else replace(model, aliases=aliases))
    return kept


class _Names:
    """Which names are taken."""

    def __init__(self, names: Iterable[str]) -> None:
        self._taken = {name_key(name) for name in names}

    def are_free(self, names: Iterable[str]) -> bool:
        return not any(name_key(name) in self._taken for name in names)

    def take(self, names: tuple[str, ...]) -> str:
        """The first that is free; where none is, the last with a number."""
        free = next((name for name in names if name_key(name) not in self._taken), "")
        number = 2
        while not free or name_key(free) in self._taken:
            free, number = f"{names[-1]}-{number}", number + 1
        self._taken.add(name_key(free))
        return free
