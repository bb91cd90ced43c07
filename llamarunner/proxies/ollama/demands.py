"""Ollama's options that are decided when a model is loaded, as what a request demands of its runner. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llamarunner.config.schema import ClientContext
from llamarunner.config.values import FlagValue
from llamarunner.proxies.ollama.options import effective
from llamarunner.runners.demand import Demand

_OWN_BATCH = 512  # Ollama's: clients that set it want nothing special


def demand_of(options: Mapping[str, Any], preset: Mapping[str, Any], policy: ClientContext) -> Demand:
    """`options` are a request's, `preset` those the model brings along, which count whatever the policy is. What stands
    for "as the program thinks best" (num_gpu -1, num_thread 0, ...) demands nothing. Raises OptionError."""
    own, wanted = effective({}, preset), effective(options, preset)
    context = own.get("num_ctx") if policy == "ignore" else wanted.get("num_ctx")
    layers = wanted.get("num_gpu", -1)
    return Demand(
        context=context if context and context > 0 else None,
        exact=policy == "honour",
        gpu_layers=layers if layers >= 0 else None,
        flags=_flags(wanted),
    )


def _flags(options: Mapping[str, Any]) -> dict[str, FlagValue]:
    flags: dict[str, FlagValue] = {}
    batch = options.get("num_batch", _OWN_BATCH)
    if batch > 0 and batch != _OWN_BATCH:
        flags |= {"batch-size": batch, "ubatch-size": batch}
    if (gpu := options.get("main_gpu", 0)) > 0:
        flags |= {"split-mode": "none", "main-gpu": gpu}
    if (threads := options.get("num_thread", 0)) > 0:
        flags["threads"] = threads
    if options.get("use_mmap") is False:
        flags["load-mode"] = "none"
    return flags
