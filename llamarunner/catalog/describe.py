"""From a file, and what its place tells of it, to a `Model`. Reads headers only; a model that cannot run is described
with its problem, so that its owner sees why."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from llamarunner.catalog import compat
from llamarunner.catalog.catalog import Capability, Model, ModelDetails, Preset
from llamarunner.catalog.details import details_of
from llamarunner.catalog.files import SUFFIX, Files, Split
from llamarunner.catalog.found import Found
from llamarunner.catalog.gguf import printable
from llamarunner.catalog.headers import KnownFile
from llamarunner.catalog.templates import built_in_template
from llamarunner.config.schema import Config, ModelConfig, ModelSettings
from llamarunner.errors import ModelFileError

_ASSUMED = frozenset({Capability.COMPLETION, Capability.TOOLS})  # of a model that is no GGUF file
_NO_TEMPLATE = "it brings its chat template in Ollama's language only: set chat_template, or pull it from Hugging Face"


def configured(name: str, settings: ModelConfig, config: Config, files: Files) -> Model:
    """A model of the configuration."""
    engine, aliases = config.engines.get(settings.engine), tuple(settings.aliases)
    model = Model(name, settings.path, settings, aliases=aliases)
    if engine is None or engine.reads_gguf:
        return with_projector(_described(model, str(model.path), files), settings.mmproj, files)
    if settings.path.is_absolute() and settings.path.suffix.lower() == SUFFIX:
        found = _described(model, str(model.path), files)
        if not found.problem:
            return found
    # a folder, or a name that its engine understands: only the engine can tell what it is
    return replace(model, details=ModelDetails(capabilities=_ASSUMED))


def discovered(name: str, found: Found, settings: ModelSettings, files: Files) -> Model:
    model = Model(
        name,
        Path(found.path),
        settings,
        aliases=found.aliases,
        source=found.source,
        problem=found.problem,
        hint=found.hint,
        preset=found.preset or Preset(),
        adapters=tuple(map(Path, found.adapters)),
        manifest_digest=found.manifest_digest,
    )
    if found.path:
        model = with_projector(
            _described(model, found.path, files), Path(found.mmproj) if found.mmproj else None, files
        )
    if found.preset is not None:
        model = _as_manifest_tells(model, found)
    return model


def _as_manifest_tells(model: Model, found: Found) -> Model:
    details, preset = model.details, model.preset
    context = preset.parameters.get("num_ctx")
    if isinstance(context, int) and not isinstance(context, bool) and context > 0:
        model = replace(model, settings=model.settings.model_copy(update={"context": context}))
    told = found.capabilities
    if not details.chat_template:
        told -= {Capability.TOOLS}  # llama.cpp's own templates have no place for them
    if Capability.COMPLETION in details.capabilities and ".Suffix" in preset.template:
        told |= {Capability.INSERT}
    model = replace(
        model,
        size_bytes=found.size_bytes or model.size_bytes,
        modified_at=found.modified_at or model.modified_at,
        details=replace(details, capabilities=details.capabilities | told) if details.architecture else details,
    )
    if preset.template and not details.chat_template and Capability.COMPLETION in details.capabilities:
        model = replace(model, chat_template=built_in_template(preset.template))
    if model.lacks_chat_template and not model.hint:
        model = replace(model, hint=_NO_TEMPLATE)
    return model


def _described(model: Model, path: str, files: Files) -> Model:
    """With what the headers of its file, or of all its parts, say."""
    try:
        paths = _parts(path, files)
        known = [files.known(part) for part in paths]
        _check_is_model(path, known[0])
    except ModelFileError as error:
        model = replace(model, problem=model.problem or error.message, hint=model.hint or error.hint)
        paths, known = [path], []
    statuses = [status for status in map(files.disk.status, paths) if status is not None]
    if len(known) == 1:
        details = known[0].details
    else:
        details = details_of(*(part.header for part in known)) if known else ModelDetails()
    needs = known[0].needs if known else ""
    return replace(
        model,
        details=details,
        size_bytes=sum(status.size for status in statuses),
        modified_at=max((status.modified_at for status in statuses), default=0.0),
        problem=model.problem or (f"only Ollama's own engine can load it: {needs}" if needs else ""),
        hint=model.hint or (compat.HINT if needs else ""),
    )


def with_projector(model: Model, projector: Path | None, files: Files) -> Model:
    """One that is of no use leaves a model without its problem, as its words can still be read."""
    if projector is None:
        return model
    try:
        known = files.known(str(projector))
        if not known.is_projector:
            raise ModelFileError(f"{printable(str(projector))}: not a projector", hint="mmproj names a mmproj-….gguf")
        if known.needs:
            raise ModelFileError(f"{printable(str(projector))}: {known.needs}", hint=compat.HINT)
    except ModelFileError as error:
        if model.source == "config":
            return replace(model, problem=model.problem or error.message, hint=model.hint or error.hint)
        return replace(model, hint=model.hint or f"it sees and hears nothing: {error.message}")
    capabilities = model.details.capabilities | known.details.capabilities
    return replace(model, mmproj=projector, details=replace(model.details, capabilities=capabilities))


def _check_is_model(path: str, known: KnownFile) -> None:
    """Raises ModelFileError."""
    shown = printable(path)
    if not known.details.architecture:
        raise ModelFileError(f"{shown}: it does not say its architecture", hint="download it again")
    if known.is_projector:
        raise ModelFileError(f"{shown}: a projector, not a model", hint="give it as the mmproj of its model")
    if not known.is_model:
        kind = printable(known.kind, 40)
        raise ModelFileError(f"{shown}: of the kind '{kind}', not a model", hint="give the path of a model")


def _parts(path: str, files: Files) -> Sequence[str]:
    """All files of the model. Raises ModelFileError where parts are missing."""
    split = Split.of(os.path.basename(path)) if "-of-" in path else None
    if split is None or split.total < 2:
        return [path]
    if split.part != 1:
        hint = f"give the first part, {printable(split.name(1))}"
        raise ModelFileError(f"{printable(path)}: only part {split.part} of a split model", hint=hint)
    folder = os.path.dirname(path)
    there = set(files.disk.files(folder))
    names = [split.name(part) for part in range(1, split.total + 1)]
    missing = [name for name in names if name not in there]
    if missing:
        first = f"{printable(os.path.join(folder, missing[0]))}: there is no such file"
        problem = f"{len(missing)} of {len(names)} parts are missing" if len(missing) > 1 else "this part is missing"
        raise ModelFileError(f"{first}, {problem}", hint="download the whole model")
    return [os.path.join(folder, name) for name in names]
