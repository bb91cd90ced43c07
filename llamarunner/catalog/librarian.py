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
    """`catalog` gives the models there are; `rescan` is awaited after each change of the library."""

    def __init__(
        self,
        library: Library,
        pulls: Pulls,
        *,
        catalog: Callable[[], Catalog],
        rescan: Callable[[], Awaitable[None]],
    ) -> None:
        self.library = library
        self.pulls = pulls
        self._catalog = catalog
        self._rescan = rescan

    async def create(self, name: ModelName, recipe: Recipe, base: str = "") -> AsyncGenerator[Progress, None]:
        """Make a model of `recipe` and, where one is named, of the model `base`, which is pulled where there is none.
        Tells what is done. Raises LlamaRunnerError; before the first line where the request itself is wrong."""
        await self._check_free(name)
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
        yield Progress("success")

    async def copy(self, source: str, destination: ModelName) -> None:
        """A second name for a model, whether it is ours or not. Raises ModelNotFoundError, NotOursError where the name
        is another's, LibraryError."""
        await self._check_free(destination)
        if (manifest := await self._find(source)) is not None:
            await asyncio.to_thread(self.library.copy, manifest, destination)
        else:
            await asyncio.to_thread(create, self.library, destination, Recipe(self._catalog().find(source)))
        await self._rescan()

    async def delete(self, text: str) -> None:
        """Remove a model of ours. Raises ModelNotFoundError, NotOursError, LibraryError."""
        manifest = await self._find(text)
        if manifest is None:
            if (known := self._catalog().get(text)) is None:
                raise ModelNotFoundError(text)
            raise NotOursError(known)
        await asyncio.to_thread(self.library.delete, manifest.name)
        await self._rescan()

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
