"""The shape of config.toml: one source for validation, defaults, JSON Schema and the example.

Every key here does something. A section with no keys yet is the settled place for what will come.
Model tables arrive here whole: `load.py` has merged `[defaults]`, `inherits`, the profile and the environment before.
"""

from __future__ import annotations

import difflib
import ipaddress
import math
import os
import re
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationInfo,
    WithJsonSchema,
    model_validator,
)

from llamarunner.units import parse_duration, parse_size

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")
_HOST = re.compile(r"[0-9A-Za-z_.:%-]+")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(?<!\.gguf)", re.ASCII)

PLACEHOLDERS = ("port", "model", "name", "context", "parallel", "api_key")
"""What an engine of kind "command" finds filled in, written ${port}."""


def _duration(value: object) -> object:
    """Seconds; a bare number is seconds already."""
    wanted = 'a duration such as "30s" or "5m" is wanted'
    seconds = _seconds(value, wanted)
    if seconds < 0:
        raise ValueError("a duration cannot be negative here")
    return seconds


def _keep_alive(value: object) -> object:
    """As a duration, and any negative one is for ever."""
    seconds = _seconds(value, 'a duration such as "5m", 0 (unload at once) or -1 (never unload) is wanted')
    return math.inf if seconds < 0 else seconds


def _seconds(value: object, wanted: str) -> float:
    if isinstance(value, str):
        try:
            return parse_duration(value)
        except ValueError:
            raise ValueError(wanted) from None
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise ValueError(wanted)
    try:
        return float(value)
    except OverflowError:
        raise ValueError(wanted) from None


def _size(value: object) -> object:
    if isinstance(value, str):
        value = parse_size(value)
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ValueError('a size such as "64MiB" is wanted')
    return value


def expand_variables(text: str, environ: Mapping[str, str] = os.environ, kept: Container[str] = ()) -> str:
    """`${VAR}` and `${VAR:-default}` from the environment, but for the names `kept`. Raises ValueError for a variable
    that is not set."""

    def replace(match: re.Match[str]) -> str:
        name: str = match[1]
        default: str | None = match[2]
        if default is None and name in kept:
            return match[0]
        found = environ.get(name, default)
        if found is None:
            near = difflib.get_close_matches(name.lower(), [each for each in PLACEHOLDERS if each in kept], n=1)
            meant = f"; did you mean ${{{near[0]}}}?" if near else ""
            wanted = f"set it, or write ${{{name}:-a default}}"
            raise ValueError(f"the environment variable {name} is not set; {wanted}{meant}")
        return found

    return _VARIABLE.sub(replace, text)


def _expanded(value: object, info: ValidationInfo, kept: Container[str] = ()) -> object:
    """`${VAR}`, by the environment of the validation context ("environ") or our own."""
    if not isinstance(value, str):
        return value
    expanded = expand_variables(value, (info.context or {}).get("environ", os.environ), kept)
    if "\0" in expanded:
        raise ValueError("a NUL character cannot be handed to a program")
    return expanded


def _template(value: object, info: ValidationInfo) -> object:
    return _expanded(value, info, PLACEHOLDERS)


def _path(value: object, info: ValidationInfo) -> object:
    """`~`, `${VAR}`; a relative path counts from the configuration file's folder (validation context "base")."""
    path, base = _named_path(value, info), _base(info)
    return path if base is None else base / path


def _model_path(value: object, info: ValidationInfo) -> object:
    """As `_path`, but a relative one stays so: `Config` knows whether the model's engine takes it for a path at all.
    What begins with "./" or "../" is one."""
    is_path = str(value).startswith(("./", "../"))
    return _path(value, info) if is_path else _named_path(value, info)


def _base(info: ValidationInfo) -> Path | None:
    base = (info.context or {}).get("base")
    return None if base is None else Path(base)


def _named_path(value: object, info: ValidationInfo) -> Path:
    if not isinstance(value, str | Path):
        raise ValueError("a path is wanted")
    text = str(_expanded(str(value), info))
    if not text.strip():
        raise ValueError("the path is empty")
    return Path(os.path.expanduser(text))  # pathlib's own raises where there is no home to be found


def _host(value: str) -> str:
    if not _HOST.fullmatch(value):
        raise ValueError('an address or name to listen on is wanted, such as "127.0.0.1", "::1" or "0.0.0.0"')
    return value


def _variable_name(value: str) -> str:
    if not value or "=" in value or "\0" in value:
        raise ValueError("this cannot be the name of an environment variable")
    return value


def _flag(value: object) -> object:
    parts = value if isinstance(value, list) else [value]
    is_list_of_flags = isinstance(value, list) and any(isinstance(part, bool) for part in value)
    if is_list_of_flags or not all(isinstance(part, bool | int | float | str) for part in parts):
        raise ValueError("true, false, a number, a string, or an array of numbers and strings is wanted")
    if any("\0" in str(part) for part in parts):
        raise ValueError("a NUL character cannot be handed to a program")
    return value


_AS_WRITTEN = WithJsonSchema({"type": ["string", "number"]})

Duration = Annotated[float, BeforeValidator(_duration), _AS_WRITTEN]
KeepAlive = Annotated[float, BeforeValidator(_keep_alive), _AS_WRITTEN]
Size = Annotated[int, BeforeValidator(_size), WithJsonSchema({"type": ["string", "integer"]})]
ConfigPath = Annotated[Path, BeforeValidator(_path)]
ModelPath = Annotated[Path, BeforeValidator(_model_path)]
Expanded = Annotated[str, BeforeValidator(_expanded)]
Template = Annotated[str, BeforeValidator(_template)]
Secret = Annotated[SecretStr, BeforeValidator(_expanded)]
Host = Annotated[str, AfterValidator(_host)]
Port = Annotated[int, Field(ge=0, le=65535)]
Environment = dict[Annotated[str, AfterValidator(_variable_name)], Expanded]
TemplateEnvironment = dict[Annotated[str, AfterValidator(_variable_name)], Template]
FlagValue = Annotated[bool | int | float | str | list[str | int | float], BeforeValidator(_flag)]


INHERITS = "Another model whose settings and path this one starts from."
PROFILES = "Named overlays of this file: [profiles.NAME] holds any of its sections."


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class ServerConfig(Section):
    host: Host = "127.0.0.1"
    """Address both proxies listen on. Anything but loopback needs an api_key for each, or allow_unauthenticated."""
    allow_unauthenticated: bool = False
    """Let anyone who can reach a non-loopback address use the models without a key."""
    drain: Duration = 30.0
    """On stop, how long running answers may go on before they are ended."""
    max_body: Size = 64 * 1024**2
    """Largest request body; a larger one is refused with 413."""


class ProxyConfig(Section):
    enabled: bool = True
    """Serve this dialect."""
    host: Host | None = None
    """Address to listen on, in place of server.host."""
    port: Port = 0
    """Port to listen on; 0 takes any free one."""
    api_key: SecretStr | None = None
    """Demand this key as `Authorization: Bearer` or `x-api-key`."""
    allowed_hosts: list[str] = []
    """Further names clients may call this machine by (the Host header); localhost, its addresses and its own name
    always work."""
    cors_origins: list[str] = []
    """Web origins whose pages may call this proxy from a browser ("https://chat.example"; "*" for any)."""


class OllamaProxyConfig(ProxyConfig):
    port: Port = 11434


class LMStudioProxyConfig(ProxyConfig):
    port: Port = 1234


class ProxiesConfig(Section):
    ollama: OllamaProxyConfig = OllamaProxyConfig()
    lmstudio: LMStudioProxyConfig = LMStudioProxyConfig()


class EngineConfig(Section):
    kind: Literal["auto", "command", "remote", "llama-server", "builtin"] = "auto"
    """auto: `url` where there is one, else `command` where it is found, else the built-in llama.cpp.
    llama-server: `command` or nothing. builtin: the llama.cpp of the `builtin` extra.
    command: `command` is any other server of OpenAI's API. remote: such a server that runs already, at `url`."""
    command: Expanded = "llama-server"
    """The program, by name on PATH or by path (llama-server or a fork of it)."""
    args: list[Template] = []
    """Arguments put before all others. For kind command ${port}, ${model} (the model's path), ${name}, ${context} and
    ${parallel} are filled in."""
    env: TemplateEnvironment = {}
    """Environment variables for its processes; for kind command filled in likewise, and ${api_key}, a fresh key."""
    health: str = "/health"
    """For kind command: the path that answers with a status of 200 to 299 once the model is loaded."""
    url: Expanded | None = None
    """For kind remote: the server's address, with or without /v1."""
    api_key: Secret | None = None
    """For kinds remote and command: the key the server wants to see; ${VAR} keeps it out of this file."""
    supports_tools: bool = True
    """false for a fork or server that fails on tools: they are taken out of requests, and the answer says so in the
    header `x-llamarunner-stripped`."""

    @property
    def is_remote(self) -> bool:
        return self.kind == "remote" or (self.kind == "auto" and self.url is not None)

    @property
    def reads_gguf(self) -> bool:
        """Whether the path of its models is that of a GGUF file."""
        return not self.is_remote and self.kind != "command"


class ModelSettings(Section):
    """What `[defaults]` and each `[models.NAME]` may both set."""

    engine: str = "default"
    """The [engines.NAME] that runs it."""
    context: Annotated[int, Field(ge=0)] = 8192
    """Tokens of context for each request; 0, or more than the model was trained for, is the model's own."""
    gpu_layers: Annotated[int, Field(ge=0)] | Literal["all", "auto"] = "auto"
    """Layers to put on the GPU: a number, "all", or "auto" (as many as fit)."""
    parallel: Annotated[int, Field(ge=1, le=256)] = 1
    """Requests answered side by side; each has the whole `context`."""
    keep_alive: KeepAlive = 300.0
    """How long a model nobody uses stays loaded; 0 unloads at once, -1 never. A request's own keep_alive wins."""
    pin: bool = False
    """Once loaded, never unload to make room or for idleness."""
    load_timeout: Duration = 300.0
    """A load that shows no progress for this long has failed."""
    hang_timeout: Duration = 120.0
    """An engine that owes an answer and gives no sign of life for this long is reported as hung; 0 never looks. Of a
    prompt llama.cpp shows one only after each batch, mostly 2048 tokens: a slow machine needs longer."""
    restart_hung: bool = False
    """End a hung engine of this machine: its requests fail, and the next one loads the model again."""
    chat_template: str | None = None
    """A template llama.cpp knows by name ("chatml"), or the path of a .jinja file; the model's own otherwise."""
    embeddings: bool | None = None
    """Serve embeddings as well. Unset: only for models made for them."""
    devices: list[str] = []
    """The only devices it may use: "gpu0", "gpu1", ..., a GPU's UUID, or "ram"; any if empty."""
    flags: dict[str, FlagValue] = {}
    """Any further flag of the engine by its long name without dashes; true gives the bare flag, false leaves it out,
    a list repeats it."""
    env: Environment = {}
    """Environment variables for its process, over the engine's."""


class ModelConfig(ModelSettings):
    path: ModelPath
    """The .gguf file (of a split model, the first part). For an engine of kind command also a folder, or a hub's id
    ("Qwen/Qwen3-8B"); for one of kind remote the name its server knows the model by."""
    mmproj: ConfigPath | None = None
    """The projector of a vision or audio model."""
    aliases: list[str] = []
    """Further names it answers to."""


class DiscoveryConfig(Section):
    folders: list[ConfigPath] = [Path(os.path.expanduser("~/models"))]
    """Folders whose .gguf files (at any depth) are models under their file's name. One that is missing is no error."""


class SchedulerConfig(Section):
    max_loaded: Annotated[int, Field(ge=0)] = 0
    """Models loaded at once; 0 for as many as fit into memory."""
    max_queue: Annotated[int, Field(ge=1)] = 512
    """Requests that may wait for a model; one more is refused with 503."""
    max_wait: Duration = 60.0
    """After waiting this long for room, a request closes a busy model to new ones, so that its own turn comes."""
    gpu_reserve: Size = 512 * 1024**2
    """Memory of each GPU that is left free."""
    ram_reserve: Size = 1024**3
    """Memory of the machine that is left free."""
    partial_offload: bool = True
    """A model that fits no GPU may lie partly in RAM, which is slow; false refuses it."""


class TuiConfig(Section):
    theme: str = "llamarunner"
    """A theme by name: one of themes/, of the `themes` folder beside the configuration, or of Textual."""
    mouse: bool = True
    """React to the mouse (off: the terminal selects text as usual)."""
    fps: Annotated[int, Field(ge=1, le=60)] = 15
    """Most screen updates a second; less is kinder to slow links."""
    ascii: bool = False
    """Draw with plain ASCII, for fonts and locales without line and block characters."""


class LoggingConfig(Section):
    level: Literal["debug", "info", "warning", "error"] = "info"
    """How much the program logs of itself. Prompts and answers are never logged."""
    file: bool = True
    """Keep the program's and each engine's log as files in the log directory."""
    max_size: Size = 10 * 1024**2
    """A log file is rotated at this size."""
    keep: Annotated[int, Field(ge=0)] = 5
    """Rotated files kept of each log."""


class AudioConfig(Section):
    """Speech models."""


class MetricsConfig(Section):
    """The Prometheus endpoint."""


class ControlConfig(Section):
    """How other programs steer this one."""


class Config(Section):
    server: ServerConfig = ServerConfig()
    proxies: ProxiesConfig = ProxiesConfig()
    engines: dict[str, EngineConfig] = {"default": EngineConfig()}
    defaults: ModelSettings = ModelSettings()
    models: dict[str, ModelConfig] = {}
    discovery: DiscoveryConfig = DiscoveryConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    tui: TuiConfig = TuiConfig()
    logging: LoggingConfig = LoggingConfig()
    audio: AudioConfig = AudioConfig()
    metrics: MetricsConfig = MetricsConfig()
    control: ControlConfig = ControlConfig()

    def proxy_host(self, proxy: ProxyConfig) -> str:
        return proxy.host or self.server.host

    @model_validator(mode="after")
    def _default_engine(self) -> Config:
        if "default" not in self.engines:
            # frozen, and a dict is not: the one entry every model falls back to is always there
            self.engines["default"] = EngineConfig()
        return self

    @model_validator(mode="after")
    def _model_paths(self, info: ValidationInfo) -> Config:
        """A relative path counts from the file's folder, unless it is a name that its engine understands."""
        if (base := _base(info)) is not None:
            for name, model in self.models.items():
                if not model.path.is_absolute() and not self._is_named(model):
                    self.models[name] = model.model_copy(update={"path": base / model.path})
        return self

    def _is_named(self, model: ModelConfig) -> bool:
        engine = self.engines.get(model.engine)
        if engine is None or engine.reads_gguf:
            return False
        return engine.is_remote or bool(_HUB_ID.fullmatch(model.path.as_posix()))


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"  # any other name may resolve to whatever it likes


def json_schema() -> dict[str, Any]:
    """JSON Schema of config.toml as a user writes it: before profiles and inheritance are resolved."""
    schema = Config.model_json_schema()
    model = schema["$defs"]["ModelConfig"]
    model["required"] = [key for key in model.get("required", ()) if key != "path"]  # it may be inherited
    model["properties"]["inherits"] = {"type": "string", "description": INHERITS}
    schema["properties"]["profiles"] = {
        "type": "object",
        "description": PROFILES,
        "additionalProperties": {"type": "object"},
    }
    return schema
