"""How a model is run: an `Engine` turns a model into a `LaunchPlan`, the command line of an HTTP server on loopback
that speaks llama-server's API. Starting and stopping it is the runners' work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from llamarunner.catalog.catalog import Model


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """Everything a runner needs to start one process. `env` is laid over our own environment."""

    argv: tuple[str, ...]
    port: int
    api_key: str = field(repr=False)  # the process learns it from `env`, never from `argv`
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    health_path: str = "/health"
    load_timeout_s: float = 300.0  # without any sign of progress

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.api_key}"}


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What is known of an engine's program. `problem` is empty where it can run models."""

    name: str  # of the [engines.NAME] table
    kind: str  # "llama-server" or "builtin"
    command: str  # path of the program
    version: str = ""
    problem: str = ""
    hint: str = ""


class Engine(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> str: ...

    def info(self) -> EngineInfo:
        """Look the program up and ask its version. Runs it, so it may take a second: call it in a thread."""
        ...

    def plan(self, model: Model, *, port: int, api_key: str) -> LaunchPlan:
        """How to start `model`. Raises EngineMissingError where the program is not there, UnsupportedError where a
        setting or flag of the model cannot be used. Only looks at the file system; quick enough for the event loop."""
        ...
