"""Discovery: the models of the configuration, and those in its folders. Reads headers only; blocks, so call it in a
thread. A model that cannot run is listed with its problem, so that its owner sees why."""

from __future__ import annotations

import logging
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from llamarunner.catalog.catalog import Capability, Catalog, Model, ModelDetails, name_key
from llamarunner.catalog.details import details_of
from llamarunner.catalog.gguf import Header, printable, read_header
from llamarunner.catalog.projectors import pair
from llamarunner.config.schema import Config, ModelConfig, ModelSettings
from llamarunner.errors import ModelFileError

logger = logging.getLogger(__name__)

MAX_FILES = 10_000  # GGUF files looked at; more are left out with a warning
MAX_FOLDERS = 50_000  # folders looked into, in case a folder such as / is given

_SUFFIX = ".gguf"
_ASSUMED = frozenset({Capability.COMPLETION, Capability.TOOLS})  # of a model that is no GGUF file
_SPLIT = re.compile(r"(?P<stem>.+)-(?P<part>\d{5})-of-(?P<total>\d{5})\.gguf", re.IGNORECASE)
_UNFINISHED_STEM = re.compile(r"\.(part|partial|incomplete|crdownload|tmp)$", re.IGNORECASE)
_UNFINISHED_BESIDE = (".aria2", ".part", ".incomplete")  # left beside a file by the downloader that still writes it


@dataclass(frozen=True, slots=True)
class _Found:
    """A model's file in a folder; of a split model the first part, which need not be there."""

    path: Path
    root: Path
    stem: str


@dataclass(frozen=True, slots=True)
class _Parts:
    paths: tuple[Path, ...]
    size_bytes: int
    modified_at: float
    headers: tuple[Header, ...]


class _Files:
    """Walks folders at any depth, each once, whatever the symbolic links say."""

    def __init__(self) -> None:
        self._folders_seen: set[tuple[int, int]] = set()
        self._left = MAX_FILES

    def below(self, root: Path) -> Iterator[tuple[Path, list[str]]]:
        """Each folder with the names of its finished .gguf files, sorted. What may not be read is passed over."""
        pending = [root]
        while pending and self._left:
            folder = pending.pop()
            if not self._enter(folder):
                continue
            try:
                with os.scandir(folder) as listing:
                    entries = sorted(listing, key=lambda entry: entry.name)
            except OSError as error:
                logger.warning("models in %s are not listed: %s", printable(str(folder)), error.strerror)
                continue
            pending.extend(Path(entry.path) for entry in reversed(entries) if _is_folder(entry))
            every = {entry.name for entry in entries}
            names = [entry.name for entry in entries if _is_finished_model(entry, every)]
            if len(names) > self._left:
                logger.warning("only the first %d model files are listed", MAX_FILES)
                names = names[: self._left]
            self._left -= len(names)
            if names:
                yield folder, names

    def _enter(self, folder: Path) -> bool:
        try:
            status = folder.stat()
        except (OSError, ValueError):
            return False  # it is missing, which is no error, or a link that leads nowhere
        identity = (status.st_dev, status.st_ino)
        if identity in self._folders_seen or not stat.S_ISDIR(status.st_mode):
            return False
        if len(self._folders_seen) == MAX_FOLDERS:
            logger.warning("only the first %d folders are searched for models", MAX_FOLDERS)
            self._left = 0
            return False
        self._folders_seen.add(identity)
        return True


def discover(config: Config) -> Catalog:
    """The configuration's models under their tables' names, then each folder's under their files' names."""
    models = [_configured(name, settings, config) for name, settings in config.models.items()]
    taken = {name_key(name) for model in models for name in (model.name, *model.aliases)}
    files_taken = {_identity(model.path) for model in models} - {None}
    files = _Files()
    for root in config.discovery.folders:
        for folder, names in files.below(root):
            models += _in_folder(folder, names, root, config.defaults, taken, files_taken)
    return Catalog(models)


def _configured(name: str, settings: ModelConfig, config: Config) -> Model:
    engine, aliases = config.engines.get(settings.engine), tuple(settings.aliases)
    if engine is None or engine.reads_gguf:
        return _describe(name, settings.path, settings, mmproj=settings.mmproj, aliases=aliases)
    if settings.path.is_absolute() and settings.path.suffix.lower() == _SUFFIX:
        found = _describe(name, settings.path, settings, aliases=aliases)
        if not found.problem:
            return found
    # a folder, or a name that its engine understands: only the engine can tell what it is
    return Model(name, settings.path, settings, details=ModelDetails(capabilities=_ASSUMED), aliases=aliases)


def _in_folder(
    folder: Path,
    names: Sequence[str],
    root: Path,
    settings: ModelSettings,
    taken: set[str],
    files_taken: set[tuple[int, int] | None],
) -> list[Model]:
    """The models of one folder. Adds their names and files to what is `taken`."""
    models, projectors = [], {}
    for found in _grouped(folder, names, root):
        header = _header_or_none(found.path)
        if header and header.is_projector:
            projectors[found.path] = header
            continue
        identity = _identity(found.path)
        if (header and not header.is_model) or (header is None and "mmproj" in found.stem.lower()):
            continue
        if identity is not None and identity in files_taken:
            continue
        files_taken.add(identity)
        models.append(_describe(_unique_name(found, taken), found.path, settings, source=printable(str(root))))
    paired = pair({model.path: model.details for model in models}, projectors)
    return [_with_projector(model, paired.get(model.path), projectors) for model in models]


def _with_projector(model: Model, path: Path | None, headers: dict[Path, Header]) -> Model:
    if path is None:
        return model
    seen = details_of(headers[path]).capabilities
    return replace(model, mmproj=path, details=replace(model.details, capabilities=model.details.capabilities | seen))


def _grouped(folder: Path, names: Iterable[str], root: Path) -> Iterator[_Found]:
    """One entry for each single file and for each set of parts."""
    sets_seen: set[tuple[str, str]] = set()
    for name in names:
        split = _SPLIT.fullmatch(name)
        if split is None:
            yield _Found(folder / name, root, name[: -len(_SUFFIX)].strip() or folder.name)
        elif (key := (split["stem"], split["total"])) not in sets_seen:
            sets_seen.add(key)
            yield _Found(folder / _part_name(split, 1), root, split["stem"])


def _unique_name(found: _Found, taken: set[str]) -> str:
    """The file's name; where that is taken with as many folders before it as make it unique, at last a number."""
    try:
        above = list(found.path.parent.relative_to(found.root).parts)
    except ValueError:
        above = []
    above = [found.root.name, *above]
    name = found.stem
    while name_key(printable(name)) in taken and above:
        name = f"{above.pop()}/{name}"
    name, number = printable(name), 2
    unique = name
    while name_key(unique) in taken:
        unique, number = f"{name}-{number}", number + 1
    taken.add(name_key(unique))
    return unique


def _describe(
    name: str,
    path: Path,
    settings: ModelSettings,
    *,
    mmproj: Path | None = None,
    aliases: tuple[str, ...] = (),
    source: str = "config",
) -> Model:
    model = Model(name=name, path=path, settings=settings, mmproj=mmproj, aliases=aliases, source=source)
    try:
        parts = _parts(path)
    except ModelFileError as error:
        size, modified = _size_and_time(path)
        return replace(model, size_bytes=size, modified_at=modified, problem=error.message, hint=error.hint)
    details = details_of(*parts.headers)
    model = replace(model, size_bytes=parts.size_bytes, modified_at=parts.modified_at, details=details)
    try:
        return _with_configured_projector(model)
    except ModelFileError as error:
        return replace(model, problem=error.message, hint=error.hint)


def _with_configured_projector(model: Model) -> Model:
    if model.mmproj is None:
        return model
    header = _header(model.mmproj)
    if not header.is_projector:
        raise ModelFileError(f"{printable(str(model.mmproj))}: not a projector", hint="mmproj names a mmproj-….gguf")
    return _with_projector(model, model.mmproj, {model.mmproj: header})


def _parts(path: Path) -> _Parts:
    """Raises ModelFileError where the file, or a part of a split one, is missing, damaged or not a model."""
    shown = printable(str(path))
    split = _SPLIT.fullmatch(path.name)
    paths = [path]
    if split and int(split["total"]) > 1:
        if int(split["part"]) != 1:
            hint = f"give the first part, {printable(_part_name(split, 1))}"
            raise ModelFileError(f"{shown}: only part {int(split['part'])} of a split model", hint=hint)
        paths = [path.with_name(_part_name(split, part)) for part in range(1, int(split["total"]) + 1)]
        _check_all_there(paths)
    headers = tuple(_header(part) for part in paths)
    if not headers[0].architecture:
        raise ModelFileError(f"{shown}: it does not say its architecture", hint="download it again")
    if headers[0].is_projector:
        raise ModelFileError(f"{shown}: a projector, not a model", hint="give it as the mmproj of its model")
    if not headers[0].is_model:
        kind = printable(headers[0].text("general.type"), 40)
        raise ModelFileError(f"{shown}: of the kind '{kind}', not a model", hint="give the path of a model")
    sizes = [_size_and_time(part) for part in paths]
    return _Parts(tuple(paths), sum(size for size, _ in sizes), max(time for _, time in sizes), headers)


def _part_name(split: re.Match[str], part: int) -> str:
    return f"{split['stem']}-{part:05}-of-{split['total']}{split.string[-len(_SUFFIX) :]}"


def _check_all_there(paths: Sequence[Path]) -> None:
    try:
        there = set(os.listdir(paths[0].parent))
    except OSError:
        there = set()
    missing = [part for part in paths if part.name not in there]
    if missing:
        first = f"{printable(str(missing[0]))}: there is no such file"
        problem = f"{len(missing)} of {len(paths)} parts are missing" if len(missing) > 1 else "this part is missing"
        raise ModelFileError(f"{first}, {problem}", hint="download the whole model")


def _header(path: Path) -> Header:
    """Raises ModelFileError. A file that did not change is not read again."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return read_header(path)  # which says what is wrong
    return _cached_header(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=MAX_FILES)
def _cached_header(path: Path, size: int, mtime_ns: int) -> Header:
    return read_header(path)


def _header_or_none(path: Path) -> Header | None:
    try:
        return _header(path)
    except ModelFileError:
        return None


def _size_and_time(path: Path) -> tuple[int, float]:
    try:
        status = path.stat()
    except (OSError, ValueError):
        return 0, 0.0
    return status.st_size, status.st_mtime


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _is_finished_model(entry: os.DirEntry[str], beside: set[str]) -> bool:
    name = entry.name
    if not name.lower().endswith(_SUFFIX) or name.startswith("._") or _UNFINISHED_STEM.search(name[: -len(_SUFFIX)]):
        return False
    if any(name + suffix in beside for suffix in _UNFINISHED_BESIDE):
        return False
    try:
        return entry.is_file() and entry.stat().st_size > 0
    except OSError:
        return False
