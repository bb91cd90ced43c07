"""Which models exist: `Model`, and `Catalog` that finds one by what a client calls it. Reads no files itself."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import Any

from llamarunner.config.schema import ModelSettings
from llamarunner.errors import ModelNotFoundError


class Capability(StrEnum):
    """In Ollama's words, which are the finest of the dialects'."""

    COMPLETION = "completion"
    TOOLS = "tools"
    INSERT = "insert"
    VISION = "vision"
    EMBEDDING = "embedding"
    THINKING = "thinking"
    AUDIO = "audio"


@dataclass(frozen=True, slots=True)
class Weights:
    """Bytes of a model's tensors, as they lie in its files. `layers` and `experts` have an entry for each block; a
    block's experts are not in its `layers`."""

    layers: tuple[int, ...] = ()
    experts: tuple[int, ...] = ()
    embedding: int = 0  # of the input tokens
    output: int = 0  # its norm alone where the embedding serves as output matrix too
    other: int = 0
    by_type: Mapping[str, int] = field(default_factory=dict)  # all but the embedding: {"Q4_K": 4_000_000_000}

    @property
    def total(self) -> int:
        return sum(self.layers) + sum(self.experts) + self.embedding + self.output + self.other


@dataclass(frozen=True, slots=True)
class ModelDetails:
    """What a GGUF header says, in the form that APIs and panes show. `gguf.py` makes it."""

    architecture: str = ""  # general.architecture: "llama"
    parameter_count: int = 0
    parameter_size: str = ""  # "135M", "8.2B"
    quantization: str = ""  # "Q4_K_M"
    context_length: int = 0  # trained for
    embedding_length: int = 0
    block_count: int = 0
    chat_template: str = ""
    basename: str = ""
    capabilities: frozenset[Capability] = frozenset()
    metadata: Mapping[str, Any] | None = None  # every key/value but long arrays (None in their place)
    weights: Weights = Weights()
    vocabulary: int = 0  # tokens
    merges: int = 0  # rules of a BPE tokenizer


@dataclass(frozen=True, slots=True)
class Preset:
    """What a model brings along beside its file, as Ollama's manifests and `create` have it."""

    parameters: Mapping[str, Any] = field(default_factory=dict)  # Ollama's options: {"temperature": 0.6, "stop": [...]}
    system: str = ""
    template: str = ""  # Go's; "" where only the file's own (Jinja) counts
    messages: tuple[Mapping[str, Any], ...] = ()  # that every conversation begins with: {"role", "content"}
    licenses: tuple[str, ...] = ()


@dataclass(frozen=True)
class Model:
    """Something that could run. `problem` says why it cannot ("" if it can), `hint` what would help."""

    name: str
    path: Path
    settings: ModelSettings
    details: ModelDetails = ModelDetails()
    mmproj: Path | None = None
    aliases: tuple[str, ...] = ()
    size_bytes: int = 0
    modified_at: float = 0.0  # unix time
    source: str = "config"  # or "library", "ollama", "lmstudio", "huggingface", or the folder it was found in
    problem: str = ""
    hint: str = ""
    is_remote: bool = False  # told of by a server elsewhere
    preset: Preset = Preset()
    adapters: tuple[Path, ...] = ()  # LoRA files
    chat_template: str = ""  # llama.cpp's name for it, where the file brings none but its manifest one in Go
    manifest_digest: str = ""  # 64 hex digits: of the Ollama manifest it comes from
    runs_as: str = ""  # the model whose runner serves it too, where they differ but in what requests say

    @property
    def runner_name(self) -> str:
        return self.runs_as or self.name

    def is_launched_like(self, other: Model) -> bool:
        """Whether an engine started for the one serves the other."""
        launch = attrgetter("chat_template", "settings", "is_remote")
        return self.has_files_of(other) and launch(self) == launch(other)

    def has_files_of(self, other: Model) -> bool:
        files = attrgetter("path", "mmproj", "adapters")
        return files(self) == files(other)

    @property
    def capabilities(self) -> frozenset[Capability]:
        found = self.details.capabilities
        if self.settings.embeddings:
            found |= {Capability.EMBEDDING}
        if self.mmproj is not None and Capability.AUDIO not in found:  # some projectors hear and do not see
            found |= {Capability.VISION}
        return found

    @property
    def is_embedding_only(self) -> bool:
        return Capability.EMBEDDING in self.capabilities and Capability.COMPLETION not in self.capabilities

    @property
    def lacks_chat_template(self) -> bool:
        """Whether nobody knows how to put a conversation before it: it was made with a template in Go's language, for
        which llama.cpp has no equal. (A mere file without one is asked in ChatML, as llama.cpp does.)"""
        known = self.settings.chat_template or self.details.chat_template or self.chat_template
        return bool(self.preset.template) and not known and Capability.COMPLETION in self.capabilities

    @property
    def context(self) -> int:
        """Tokens each request gets: the configured number, within what the model was trained for."""
        trained, wanted = self.details.context_length, self.settings.context
        if not wanted:
            return trained or 4096
        return min(wanted, trained) if trained else wanted

    @cached_property
    def digest(self) -> str:
        """64 hex digits that stay the same while the file does; not a hash of its content, which may be 100 GB."""
        if self.manifest_digest:
            return self.manifest_digest
        identity = f"{self.path}\0{self.size_bytes}\0{self.modified_at}"
        return hashlib.sha256(identity.encode("utf-8", "surrogateescape")).hexdigest()


def name_key(name: str) -> str:
    """Names are compared without case, and without what Ollama leaves out of its own: the tag, registry and namespace
    that stand for themselves."""
    return name.strip().casefold().removesuffix(":latest").removeprefix("registry.ollama.ai/").removeprefix("library/")


class Catalog:
    """Immutable; a change on disk or in the configuration makes a new one.

    Where two models claim one name, the earlier keeps it: give those of the configuration first.
    """

    def __init__(self, models: Iterable[Model] = ()) -> None:
        self._models: dict[str, Model] = {}
        self._names: dict[str, Model] = {}
        self._by_path: dict[Path, list[Model]] = {}  # of each file, those that are started differently
        for model in models:
            if name_key(model.name) in self._names:
                continue
            self._add(model)
        for model in self._models.values():
            for alias in model.aliases:
                self._names.setdefault(name_key(alias), model)

    def _add(self, model: Model) -> None:
        alike = next((m for m in self._by_path.get(model.path, ()) if m.is_launched_like(model)), None)
        if alike is not None and model.source != "config":  # a table of its own is meant to run on its own
            model = replace(model, runs_as=alike.name)
        else:
            self._by_path.setdefault(model.path, []).append(model)
        self._models[model.name] = model
        self._names[name_key(model.name)] = model

    def __iter__(self) -> Iterator[Model]:
        return iter(self._models.values())

    def __len__(self) -> int:
        return len(self._models)

    def get(self, name: str) -> Model | None:
        return self._names.get(name_key(name))

    def find(self, name: str) -> Model:
        """The model a client means by `name`. Raises ModelNotFoundError, with the nearest name there is."""
        if model := self.get(name):
            return model
        near = difflib.get_close_matches(name_key(name), self._names, n=1, cutoff=0.5)
        raise ModelNotFoundError(name, self._names[near[0]].name if near else "")
