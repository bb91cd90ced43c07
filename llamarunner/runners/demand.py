"""What one request wants of its model's runner beyond the configuration: more context, other flags. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from llamarunner.catalog.catalog import Model
from llamarunner.config.values import FlagValue
from llamarunner.engines.flags import canonical


@dataclass(frozen=True, slots=True)
class Demand:
    """A runner that does not meet it is drained and loaded again. What the configuration says of a flag, or of
    `gpu_layers`, stands: no request changes it."""

    context: int | None = None  # tokens for each request; None for as many as there are
    exact: bool = False  # more than `context` will not do either
    gpu_layers: int | None = None
    flags: Mapping[str, FlagValue] = field(default_factory=dict)  # llama-server's, by their long names

    @property
    def key(self) -> tuple[object, ...]:
        """Tells demands apart."""
        return (self.context, self.exact, self.gpu_layers, *sorted((name, str(v)) for name, v in self.flags.items()))

    def within(self, model: Model) -> Demand:
        """Without what the configuration of `model` decides, or gives already."""
        decided = {canonical(name) for name in model.settings.flags}
        flags = {canonical(name): value for name, value in self.flags.items() if canonical(name) not in decided}
        layers = self.gpu_layers if model.settings.gpu_layers == "auto" else None
        context = self._clamped(model)
        if context is not None and not self.exact and context <= model.context:
            context = None
        if context is None and layers is None and not flags:
            return NO_DEMAND
        return Demand(context, self.exact and context is not None, layers, flags)

    def _clamped(self, model: Model) -> int | None:
        """No model is given more context than it was trained for."""
        trained = model.details.context_length
        return min(self.context, trained) if self.context is not None and trained else self.context

    def applied(self, model: Model) -> Model:
        """`model` with the settings that meet it."""
        if self is NO_DEMAND:
            return model
        changes: dict[str, object] = {}
        if self.context is not None:
            changes["context"] = self.context
        if self.gpu_layers is not None:
            changes["gpu_layers"] = self.gpu_layers
        if self.flags:
            changes["flags"] = {**model.settings.flags, **self.flags}
        return replace(model, settings=model.settings.model_copy(update=changes))

    def is_met_by(self, launched: Model) -> bool:
        """Whether a runner of `launched` will do."""
        settings = launched.settings
        if self.context is not None:
            has = launched.context
            if has < self.context or (self.exact and has != self.context):
                return False
        if self.gpu_layers is not None and settings.gpu_layers != self.gpu_layers:
            return False
        return all(settings.flags.get(name) == value for name, value in self.flags.items())

    def joins(self, other: Demand) -> bool:
        """Whether one runner can meet both: where they want but more or less context."""
        return not self.exact and not other.exact and (self.gpu_layers, self.flags) == (other.gpu_layers, other.flags)

    def __str__(self) -> str:
        """For a person: "context 32768, threads 4"."""
        parts = [f"context {self.context}"] if self.context is not None else []
        parts += [f"{self.gpu_layers} layers on the GPU"] if self.gpu_layers is not None else []
        parts += [f"{name} {value}" for name, value in self.flags.items()]
        return ", ".join(parts)


NO_DEMAND = Demand()
