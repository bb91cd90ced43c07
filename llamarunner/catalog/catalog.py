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
    file_id: tuple[int, int] | None = None  # device and inode, links followed; None where nobody looked
    runs_as: str = ""  # the model whose runner serves it too, where they differ but in what requests say

    @property
    def runner_name(self) -> str:
        return self.runs_as or self.name

    def is_launched_like(self, other: Model) -> bool:
        """Whether an engine started for the one serves the other."""
        launch = attrgetter("chat_template", "settings", "is_remote")
        return self.has_files_of(other) and launch(self) == launch(other)

    def has_files_of(self, other: Model) -> bool:
        """Whatever the paths, a link's or a file's. A path that stays is the same file to us: the numbers of some file
        systems change by themselves."""
        is_same = self.path == other.path or (self.file_id is not None and self.file_id == other.file_id)
        return is_same and (self.mmproj, self.adapters) == (other.mmproj, other.adapters)

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


class _Runners:
    """Which models are served by the runner of another. It goes by the name of one that brings nothing along of its
    own, where there is such a one."""

    def __init__(self, models: Iterable[Model]) -> None:
        # of each file, by its path and by its number, those that are started differently
        self._by_file: dict[Path | tuple[int, int], list[Model]] = {}
        for model in sorted(models, key=lambda model: model.preset != Preset()):
            if model.source == "config" or self._like(model) is None:
                for key in self._keys(model):
                    self._by_file.setdefault(key, []).append(model)

    def shared_by(self, model: Model) -> Model:
        """`model` with the name of the one whose runner serves it. A table of the configuration runs on its own."""
        alike = None if model.source == "config" else self._like(model)
        return model if alike is None or alike.name == model.name else replace(model, runs_as=alike.name)

    def _like(self, model: Model) -> Model | None:
        beside = (other for key in self._keys(model) for other in self._by_file.get(key, ()))
        return next((other for other in beside if other.is_launched_like(model)), None)

    @staticmethod
    def _keys(model: Model) -> list[Path | tuple[int, int]]:
        return [model.path] if model.file_id is None else [model.path, model.file_id]


class Catalog:
    """Immutable; a change on disk or in the configuration makes a new one.

    Where two models claim one name, the earlier keeps it: give those of the configuration first.
    """

    def __init__(self, models: Iterable[Model] = ()) -> None:
        self._models: dict[str, Model] = {}
        self._names: dict[str, Model] = {}
        kept: dict[str, Model] = {}
        for model in models:
            kept.setdefault(name_key(model.name), model)
        runners = _Runners(kept.values())
        for key, model in kept.items():
            model = runners.shared_by(model)
            self._models[model.name] = self._names[key] = model
        for model in self._models.values():
            for alias in model.aliases:
                self._names.setdefault(name_key(alias), model)

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
