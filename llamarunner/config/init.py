"""`llamarunner init`: a first configuration for this machine, written once and never over another."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import tomli_w

from llamarunner import ports
from llamarunner.config.schema import Config
from llamarunner.errors import ConfigError

_MOST_FOLDERS = 2000  # looked into below each place, for a home on a slow network disk
_MOST_SHOWN = 8


@dataclass(frozen=True, slots=True)
class FoundPort:
    """A proxy's usual port, who holds it ("" if nobody), and the port to use."""

    proxy: str
    usual: int
    holder: str
    port: int


@dataclass(frozen=True, slots=True)
class Machine:
    """What a first configuration depends on."""

    llama_server: str = ""  # its path
    has_builtin: bool = False
    gpus: tuple[str, ...] = ()
    ports: tuple[FoundPort, ...] = ()
    models: tuple[Path, ...] = ()
    folders: tuple[Path, ...] = ()  # where they were found, the usual one first


def write_initial_config(path: Path, *, gpus: Sequence[str] = ()) -> Machine:
    """Look around and write `path`, readable by its owner alone. Raises ConfigError where anything is there already.

    `gpus` are the GPUs to mention, by name.
    """
    machine = look_around(gpus=gpus)
    _write_new(path, initial_config(machine))
    return machine


def look_around(*, gpus: Sequence[str] = ()) -> Machine:
    """The program, ports and model files of this machine. Takes as long as two folder trees do."""
    usual = Path(os.path.expanduser("~/models"))
    places = [place for place in dict.fromkeys((usual, Path.cwd())) if _is_writable_down(str(place))]
    models = {folder: sorted(_model_files(folder)) for folder in places}
    folders = [folder for folder in models if folder == usual or (models[folder] and not folder.is_relative_to(usual))]
    server = shutil.which(Config().engines["default"].command) or ""
    return Machine(
        llama_server=server if _is_writable_down(server) else "",
        has_builtin=find_spec("xllamacpp") is not None,
        gpus=tuple(gpus),
        ports=tuple(_find_ports()),
        models=tuple(dict.fromkeys(file for folder in folders for file in models[folder])),
        folders=tuple(folders),
    )


def initial_config(machine: Machine) -> str:
    """The text of a configuration that suits the machine."""
    lines = [
        "# LlamaRunner's configuration for this machine. What is not said here has its default; `llamarunner check`",
        "# looks for mistakes, and `llamarunner check --explain` shows every value in force.",
        "",
        *_engine_lines(machine),
        "",
        *_port_lines(machine),
        "",
        "# Inherited by every model.",
        "[defaults]",
        f"# {_gpu_note(machine)}",
        '# gpu_layers = "auto"',
        "# context = 8192",
        '# keep_alive = "5m"',
        "",
        "# Folders whose .gguf files are models under their file's name.",
        "[discovery]",
        _pair("folders", [str(folder) for folder in machine.folders]),
        "",
        *_model_lines(machine),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _engine_lines(machine: Machine) -> list[str]:
    if machine.llama_server:
        return [
            f"# Found: {_comment(machine.llama_server)}",
            "[engines.default]",
            'kind = "auto"',
            _pair("command", machine.llama_server),
        ]
    if machine.has_builtin:
        note = ["# No llama-server was found on PATH: the built-in llama.cpp runs the models."]
    else:
        note = [
            "# Neither llama-server nor the built-in llama.cpp was found. Install llama.cpp and set `command` to its",
            "# llama-server, or install LlamaRunner with its extra: llamarunner[builtin].",
        ]
    return [*note, "[engines.default]", 'kind = "auto"', '# command = "/path/to/llama-server"']


def _port_lines(machine: Machine) -> Iterator[str]:
    for number, found in enumerate(machine.ports):
        if number:
            yield ""
        if found.port == found.usual:
            yield f"[proxies.{found.proxy}]"
            yield f"# port = {found.port}"
        else:
            holder = _comment(found.holder or "another program")
            yield f"# {found.usual} is held by {holder}; stop it to use the usual port."
            yield f"[proxies.{found.proxy}]"
            yield f"port = {found.port}"


def _gpu_note(machine: Machine) -> str:
    if not machine.gpus:
        return "No NVIDIA GPU was found: models run on the CPU."
    return f"GPU: {_comment(', '.join(machine.gpus))}. As many layers as fit are put on it."


def _model_lines(machine: Machine) -> Iterator[str]:
    if not machine.models:
        yield "# No .gguf file was found yet. Put some into a folder above, or name one:"
        files: Sequence[Path] = (Path("~/models/some-model-Q4_K_M.gguf"),)
    else:
        yield f"# Found: {len(machine.models)}. They need no table; one gives a model a name and settings of its own:"
        files = machine.models[:_MOST_SHOWN]
    for file in files:
        yield "#"
        for line in tomli_w.dumps({"models": {file.stem: {"path": str(file)}}}).strip().splitlines():
            yield f"# {line}"
    if len(machine.models) > _MOST_SHOWN:
        yield f"#\n# ... and {len(machine.models) - _MOST_SHOWN} more."


def _pair(key: str, value: object) -> str:
    return tomli_w.dumps({key: value}).strip()


def _comment(text: str) -> str:
    """Fit to stand in a comment: what came from outside may hold line ends."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _find_ports() -> Iterator[FoundPort]:
    config, given = Config(), list[int]()
    for name, proxy in (("ollama", config.proxies.ollama), ("lmstudio", config.proxies.lmstudio)):
        host = config.proxy_host(proxy)
        port = ports.free_port_near(host, proxy.port, avoid=tuple(given))
        given.append(port)
        yield FoundPort(name, proxy.port, "" if port == proxy.port else ports.holder_of(host, proxy.port), port)


def _model_files(folder: Path) -> Iterator[Path]:
    """The .gguf files below that are models: of a split one its first part, and no projectors."""
    for number, (parent, folders, files) in enumerate(os.walk(folder)):
        if number >= _MOST_FOLDERS:
            return
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            lower = name.lower()
            is_later_part = "-of-" in lower and "-00001-of-" not in lower
            if lower.endswith(".gguf") and "mmproj" not in lower and not is_later_part and _is_writable_down(name):
                yield Path(parent, name)


def _is_writable_down(path: str) -> bool:
    """Whether the configuration can say it: no bytes that are not text, nothing that reads as a variable."""
    return "${" not in path and not any("\ud800" <= letter <= "\udfff" for letter in path)


def _write_new(path: Path, text: str) -> None:
    """Whole or not at all, and never in the place of anything: a link fails where the name is taken."""
    try:
        _make_folder(path.parent)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # 0600
        try:
            with open(descriptor, "w", encoding="utf-8", newline="\n") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(descriptor)
            _link(name, path)
        finally:
            os.unlink(name)
    except FileExistsError:
        raise ConfigError(f"{path} exists already; nothing was written", hint="name another file") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from None


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except FileExistsError:
        raise ConfigError(f"{folder} is not a folder") from None


def _link(source: str, path: Path) -> None:
    try:
        os.link(source, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "wb") as stream:
            stream.write(Path(source).read_bytes())
