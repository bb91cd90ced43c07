"""What Ollama calls a model: `[host/][namespace/]model[:tag]`. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath

from llamarunner.errors import RequestError

DEFAULT_HOST = "registry.ollama.ai"
DEFAULT_NAMESPACE = "library"
DEFAULT_TAG = "latest"

# Ollama's rules. A part begins with a letter, digit or underscore, so that none is "." or ".."
_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,349}")
_NAMESPACE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,79}")
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}")


class InvalidNameError(RequestError):
    """In Ollama's words."""

    code = "invalid_model_name"

    def __init__(self) -> None:
        super().__init__("invalid model name")


@dataclass(frozen=True, slots=True)
class ModelName:
    """A whole name, as its user spelled it; every part is valid. Compare `key`s: case does not count."""

    host: str
    namespace: str
    model: str
    tag: str

    def __post_init__(self) -> None:
        """Raises InvalidNameError."""
        rules = ((self.host, _HOST), (self.namespace, _NAMESPACE), (self.model, _PART), (self.tag, _PART))
        if not all(rule.fullmatch(part) for part, rule in rules):
            raise InvalidNameError

    @classmethod
    def parse(cls, text: str) -> ModelName:
        """`text` with the defaults for the parts it leaves out. Raises InvalidNameError."""
        path, tag = text, DEFAULT_TAG
        if text.rfind(":") > text.rfind("/"):  # a colon before a slash is a port
            path, _, tag = text.rpartition(":")
        parts = path.rsplit("/", 2)
        defaults = (DEFAULT_HOST, DEFAULT_NAMESPACE)
        host, namespace, model = (*defaults[: 3 - len(parts)], *parts)
        return cls(host, namespace, model, tag)

    @classmethod
    def of_path(cls, path: PurePosixPath) -> ModelName:
        """The inverse of `path`. Raises InvalidNameError."""
        if len(path.parts) != 4:
            raise InvalidNameError
        return cls(*path.parts)

    def __str__(self) -> str:
        return f"{self.host}/{self.namespace}/{self.model}:{self.tag}"

    @property
    def key(self) -> str:
        return str(self).lower()

    @property
    def short(self) -> str:
        """As Ollama lists it: without what is the default, but always with the tag."""
        name = f"{self.model}:{self.tag}"
        if self.host.lower() != DEFAULT_HOST:
            return str(self)
        return name if self.namespace.lower() == DEFAULT_NAMESPACE else f"{self.namespace}/{name}"

    @property
    def path(self) -> PurePosixPath:
        """Of its manifest, below the folder `manifests` of a store."""
        return PurePosixPath(self.host, self.namespace, self.model, self.tag)
