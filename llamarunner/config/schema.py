"""The shape of config.toml: one source for validation, defaults, JSON Schema and the example.

Every key here does something. A section with no keys yet is the settled place for what will come.
Model tables arrive here whole: `load.py` has merged `[defaults]`, `inherits`, the profile and the environment before.
"""

from __future__ import annotations

import ipaddress
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationInfo, model_validator

from llamarunner.config.values import (
    ConfigPath,
    Duration,
    Environment,
    Expanded,
    FlagValue,
    Host,
    KeepAlive,
    ModelPath,
    Network,
    Port,
    Secret,
    Size,
    Template,
    TemplateEnvironment,
    base_folder,
)

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(?<!\.gguf)", re.ASCII)

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
    request_timeout: Annotated[Duration, Field(gt=0)] = 60.0
    """How long a request's headers may take to arrive, or its body come at under 1 KiB/s. Answers have no limit."""


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
    """Web origins whose pages may call this proxy from a browser ("https://chat.example"; "*" for any, also as
    a part: "chrome-extension://*")."""


ClientContext = Literal["honour", "grow-only", "ignore"]


class OllamaProxyConfig(ProxyConfig):
    port: Port = 11434
    client_num_ctx: ClientContext = "grow-only"
    """A client's num_ctx. grow-only: a model with less context is loaded again with as much, and stays so.
    honour: it is loaded again for less as well, as Ollama does. ignore: the context set for the model counts."""


class LMStudioProxyConfig(ProxyConfig):
    port: Port = 1234


class ProxiesConfig(Section):
    ollama: OllamaProxyConfig = OllamaProxyConfig()
    lmstudio: LMStudioProxyConfig = LMStudioProxyConfig()


class ClientConfig(Section):
    """Who asks, recognised by a key or an address."""

    api_key: Secret | None = None
    """The key it shows. It opens every proxy that demands one."""
    addresses: list[Network] = []
    """Addresses and networks it asks from ("192.168.1.20", "10.0.0.0/8"), where it shows no key."""
    priority: int = 0
    """Added to that of the models it asks: its requests go before those with less."""


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
    keep_alive_min: Duration = 0.0
    """A request's keep_alive counts as no less than this, an unload by a client included."""
    keep_alive_max: Duration | None = None
    """A request's keep_alive counts as no more than this."""
    pin: bool = False
    """Once loaded, never unload to make room or for idleness."""
    tags: list[str] = []
    """Words of your own for `scheduler.never_together` and `scheduler.always_stay`."""
    priority: int = 0
    """Its requests go before those of models with less, until one of these has waited for scheduler.max_wait."""
    replicas: Annotated[int, Field(ge=1, le=64)] = 1
    """Runners of it at once, where there is room: a request goes to the one with the fewest."""
    also_on: list[str] = []
    """Further [engines.NAME] that run it too: a replica on each."""
    max_requests: Annotated[int, Field(ge=0)] = 0
    """Requests answered side by side at most; 0 for as many as its engine has slots."""
    max_queue: Annotated[int, Field(ge=0)] = 0
    """Requests that may wait for it; one more is refused. 0 for scheduler.max_queue alone."""
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
    ollama: bool = True
    """List the models in Ollama's folder, under Ollama's names. Nothing is written there."""
    lmstudio: bool = True
    """List the models that LM Studio downloaded."""
    huggingface: bool = True
    """List the .gguf files in Hugging Face's cache."""
    folders: list[ConfigPath] = [Path(os.path.expanduser("~/models"))]
    """Folders whose .gguf files (at any depth) are models under their file's name. One that is missing is no error."""
    library: ConfigPath | None = None
    """Where downloaded and created models are kept, in Ollama's layout. Unset: the user's data folder."""


class SchedulerConfig(Section):
    max_loaded: Annotated[int, Field(ge=0)] = 0
    """Models loaded at once; 0 for as many as fit into memory."""
    max_queue: Annotated[int, Field(ge=1)] = 512
    """Requests that may wait for a model; one more is refused with 503."""
    max_wait: Duration = 60.0
    """After waiting this long for room, a request closes a busy model to new ones, so that its own turn comes."""
    min_residency: Duration = 5.0
    """A model just loaded does not make room for another this soon, unless nobody asked it for a fifth of that time;
    nor is it loaded again for options that contradict those it was loaded for."""
    never_together: list[str] = []
    """Tags: of the models that have one of these, only one is loaded at a time."""
    always_stay: list[str] = []
    """Tags: models that have one of these stay once loaded, as with `pin`."""
    yield_to_others: bool = False
    """Unload idle models when other programs take memory, until the reserve is free again."""
    gpu_reserve: Size = 512 * 1024**2
    """Memory of each GPU that is left free."""
    ram_reserve: Size = 1024**3
    """Memory of the machine that is left free."""
    partial_offload: bool = True
    """A model that fits no GPU may lie partly in RAM, which is slow; false refuses it."""
    spread: bool = False
    """Lay every model over all GPUs, though one would hold it."""


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
    clients: dict[str, ClientConfig] = {}
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
        if (base := base_folder(info)) is not None:
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
