"""`Librarian`: what may be done to the models there are: create, copy, delete. Only our own library is ever changed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace

from llamarunner.catalog.catalog import Catalog, Model
from llamarunner.catalog.create import Recipe, create
from llamarunner.catalog.library import Library
from llamarunner.catalog.manifests import Manifest
from llamarunner.catalog.names import InvalidNameError, ModelName
from llamarunner.catalog.pull import Progress, Pulls
from llamarunner.errors import ModelNotFoundError, RequestError


class NotOursError(RequestError):
    """The model is none that we may change; `hint` says who may."""

    code = "not_ours"

    def __init__(self, model: Model) -> None:
        if model.is_remote:
            what, hint = "a model of another server", "remove it there"
        elif model.source == "config":
            what, hint = "set up in the configuration", f"take [models.{model.name}] out of config.toml"
        elif model.manifest_digest:
            what, hint = "in Ollama's own store, which is only read", f"`ollama rm {model.name}` removes it"
        else:
            what, hint = f"the file {model.path}, which is only read", "remove the file"
        super().__init__(f"'{model.name}' is {what}", hint=hint)


class Librarian:
    """`catalog` gives the models there are, `rescan` is awaited after each change of the library, and `expire` unloads
    a model as soon as nobody uses it."""

    def __init__(
        self,
        library: Library,
        pulls: Pulls,
        *,
        catalog: Callable[[], Catalog],
        rescan: Callable[[], Awaitable[None]],
        expire: Callable[[Model], None],
    ) -> None:
        self.library = library
        self.pulls = pulls
        self._catalog = catalog
        self._rescan = rescan
        self._expire = expire

    async def create(self, name: ModelName, recipe: Recipe, base: str = "") -> AsyncGenerator[Progress, None]:
        """Make a model of `recipe` and, where one is named, of the model `base`, which is pulled where there is none.
        Tells what is done. Raises LlamaRunnerError; before the first line where the request itself is wrong."""
        await self._check_free(name)
        before = self._catalog().get(name.short)
        if base:
            if self._catalog().get(base) is None:
                async with aclosing(self.pulls.pull(base)) as lines:
                    async for line in lines:
                        if line.status != "success":  # which would be the end
                            yield line
            recipe = replace(recipe, base=self._catalog().find(base))
        for status in await asyncio.to_thread(create, self.library, name, recipe):
            yield Progress(status)
        await self._rescan()
        self._expire_changed(before)
        yield Progress("success")

    async def copy(self, source: str, destination: ModelName) -> None:
        """A second name for a model, whether it is ours or not. Raises ModelNotFoundError, NotOursError where the name
        is another's, LibraryError."""
        await self._check_free(destination)
        before = self._catalog().get(destination.short)
        if (manifest := await self._find(source)) is not None:
            await asyncio.to_thread(self.library.copy, manifest, destination)
        else:
            await asyncio.to_thread(create, self.library, destination, Recipe(self._catalog().find(source)))
        await self._rescan()
        self._expire_changed(before)

    async def delete(self, text: str) -> None:
        """Remove a model of ours, and unload it. Raises ModelNotFoundError, NotOursError, LibraryError."""
        manifest = await self._find(text)
        before = self._catalog().get(text)
        if manifest is None:
            if before is None:
                raise ModelNotFoundError(text)
            raise NotOursError(before)
        await asyncio.to_thread(self.library.delete, manifest.name)
        await self._rescan()
        self._expire_changed(before)

    async def _find(self, text: str) -> Manifest | None:
        try:
            name = ModelName.parse(text)
        except InvalidNameError:
            return None  # others' models may be called anything
        return await asyncio.to_thread(self.library.find, name)

    async def _check_free(self, name: ModelName) -> None:
        """Raises NotOursError where a model of that name would stand before ours."""
        known = self._catalog().get(name.short)
        if known is not None and await self._find(name.short) is None:
            raise NotOursError(known)

    def _expire_changed(self, before: Model | None) -> None:
        """Its process has what is no longer there, or no longer the same."""
        if before is None:
            return
        after = self._catalog().get(before.name)
        if after is None or (after.path, after.mmproj, after.adapters) != (before.path, before.mmproj, before.adapters):
            self._expire(before)
