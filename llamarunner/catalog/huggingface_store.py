"""Models in Hugging Face's cache: models--<owner>--<repository>/snapshots/<revision>/… are links to blobs. Blocks."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping

from llamarunner.catalog.files import Files, Group, projectors_of
from llamarunner.catalog.folders import names_within
from llamarunner.catalog.found import Found
from llamarunner.catalog.gguf import printable
from llamarunner.catalog.quantization import preferred, quantization_in

logger = logging.getLogger(__name__)

SOURCE = "huggingface"
_PREFIX = "models--"


def huggingface_folder(environ: Mapping[str, str]) -> str:
    """Of the cache, by the variables that its own library goes by; it need not exist."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if folder := environ.get(name):
            return os.path.expanduser(folder)
    if home := environ.get("HF_HOME"):
        return os.path.join(os.path.expanduser(home), "hub")
    user = environ.get("HOME") or os.path.expanduser("~")
    return os.path.join(environ.get("XDG_CACHE_HOME") or os.path.join(user, ".cache"), "huggingface", "hub")


def models(files: Files, root: str) -> Iterator[Found]:
    for folder in files.disk.folders(root):
        owner, separator, repository = folder.removeprefix(_PREFIX).partition("--")
        if folder.startswith(_PREFIX) and separator and repository:
            yield from _repository(files, os.path.join(root, folder), owner, repository)


def _repository(files: Files, folder: str, owner: str, repository: str) -> Iterator[Found]:
    seen: set[str] = set()  # files of a newer revision
    for revision in _revisions(files, folder):
        snapshot = os.path.join(folder, "snapshots", revision)
        whole = Group(snapshot)  # a repository is one model, whatever its folders
        for group in files.below(snapshot):
            whole.models |= group.models
            whole.details |= group.details
            whole.projectors |= group.projectors
        paired, chosen = projectors_of(whole), preferred(whole.models)
        for path, stem in whole.models.items():
            relative = os.path.relpath(path, snapshot)
            if relative in seen:
                continue
            seen.add(relative)
            inner = tuple(os.path.dirname(relative).split(os.sep)) if os.path.dirname(relative) else ()
            aliases = _aliases(printable(f"{owner}/{repository}"), stem, is_chosen=path == chosen)
            yield Found(
                path,
                names_within((owner, repository, *inner), stem),
                SOURCE,
                tuple(aliases),
                mmproj=paired.get(path, ""),
            )


def _aliases(repository: str, stem: str, *, is_chosen: bool) -> Iterator[str]:
    """As `llama-server -hf` and Ollama name it."""
    quantization = quantization_in(stem)
    for name in (repository, f"hf.co/{repository}"):
        if is_chosen:
            yield name
        if quantization:
            yield f"{name}:{quantization}"


def _revisions(files: Files, folder: str) -> list[str]:
    """The branch `main` first, then the others, the newest first."""
    snapshots = os.path.join(folder, "snapshots")
    names = list(files.disk.folders(snapshots))
    reference = os.path.join(folder, "refs", "main")
    main = ""
    if (status := files.disk.status(reference)) is not None and status.is_file and status.size < 200:
        try:
            with open(reference, encoding="ascii", errors="replace") as file:
                main = file.read().strip()
        except OSError as error:
            logger.debug("%s: %s", printable(reference), error)

    def age(name: str) -> tuple[bool, int, str]:
        status = files.disk.status(os.path.join(snapshots, name))
        return name != main, -(status.mtime_ns if status else 0), name

    return sorted(names, key=age)
