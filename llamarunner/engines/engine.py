"""How a model is run: an `Engine` turns a model into a `LaunchPlan`, the command line of an HTTP server on loopback
that speaks OpenAI's API, or the address of one that runs already. Starting and stopping it is the runners' work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from llamarunner.catalog.catalog import Model
from llamarunner.engines.projection import Projection


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """Everything a runner needs to start one process, whose environment is ours with `env` over it; or to use a server
    elsewhere, at `url`: there is no process then, `argv` is empty and `port` 0."""

    argv: tuple[str, ...]
    port: int
    api_key: str = field(repr=False)  # the process learns it from `env`, never from `argv`; "" if it wants none
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    health_path: str = "/health"
    load_timeout_s: float = 300.0  # without any sign of progress
    url: str = ""  # without /v1 and final slash
    served_model: str = ""  # what the server calls the model: a request must say it; "" where any name will do
    supports_tools: bool = True
    is_llama_cpp: bool = True  # it has llama.cpp's own routes too (/props, /slots, /tokenize), behind the key

    @property
    def base_url(self) -> str:
        return self.url or f"http://127.0.0.1:{self.port}"

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What is known of an engine's program or server. `problem` is empty where it can run models."""

    name: str  # of the [engines.NAME] table
    kind: str  # "llama-server", "builtin", "command" or "remote"
    command: str  # path of the program, or the server's URL
    version: str = ""
    problem: str = ""
    hint: str = ""


class Engine(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> str: ...

    @property
    def is_local(self) -> bool:
        """Whether its models take memory of this machine."""
        ...

    @property
    def is_adjustable(self) -> bool:
        """Whether a request may have its model loaded with another context or other flags."""
        ...

    @property
    def known_version(self) -> str:
        """Of its program, as far as it is known without running or asking anything; "" where it is not."""
        ...

    def info(self) -> EngineInfo:
        """Look the program up and ask its version, or ask the server. May take seconds: call it in a thread."""
        ...

    def project(self, model: Model) -> Projection | None:
        """What the engine's own tool says of the model's memory, where it has one. May take seconds: call it in a
        thread. Raises UnsupportedError for a flag that may not be set."""
        ...

    def plan(self, model: Model, *, port: int, api_key: str) -> LaunchPlan:
        """How to start `model`. Raises EngineMissingError where the program is not there, UnsupportedError where a
        setting or flag of the model cannot be used. Only looks at the file system; quick enough for the event loop."""
        ...
