"""With which of llama-server's flags a model is started: ours, and the user's over them. Pure but for one look whether
a chat template names a file."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping

from llamarunner.catalog.catalog import Capability, Model
from llamarunner.config.values import FlagValue
from llamarunner.errors import UnsupportedError

Flags = dict[str, FlagValue]

ALL_LAYERS = 999  # more than any model has: every build of llama-server takes a number, only newer ones "all"
_EMBEDDING_BATCH = 2048  # an input must fit into one physical batch, and 512 tokens are too few for documents

# Other spellings of a flag; a person may write any of them.
_SPELLINGS = {
    "a": "alias",
    "b": "batch-size",
    "c": "ctx-size",
    "cb": "cont-batching",
    "cmoe": "cpu-moe",
    "cram": "cache-ram",
    "ctk": "cache-type-k",
    "ctv": "cache-type-v",
    "ctxcp": "ctx-checkpoints",
    "dev": "device",
    "embedding": "embeddings",
    "fa": "flash-attn",
    "fitc": "fit-ctx",
    "fitt": "fit-target",
    "gpu-layers": "n-gpu-layers",
    "hf": "hf-repo",
    "hfr": "hf-repo",
    "kvu": "kv-unified",
    "lm": "load-mode",
    "log-verbosity": "verbosity",
    "lv": "verbosity",
    "m": "model",
    "mg": "main-gpu",
    "mm": "mmproj",
    "mu": "model-url",
    "n": "predict",
    "n-predict": "predict",
    "ncmoe": "n-cpu-moe",
    "ngl": "n-gpu-layers",
    "nkvo": "no-kv-offload",
    "no-ui": "no-webui",
    "nocb": "no-cont-batching",
    "np": "parallel",
    "ot": "override-tensor",
    "reranking": "rerank",
    "s": "seed",
    "sm": "split-mode",
    "swa-checkpoints": "ctx-checkpoints",
    "t": "threads",
    "tb": "threads-batch",
    "temperature": "temp",
    "to": "timeout",
    "ts": "tensor-split",
    "typical-p": "typical",
    "ub": "ubatch-size",
    "ui": "webui",
}
_SETTING_INSTEAD = "set the model's path"
_OURS_ALONE = "leave it out: each engine gets its own on loopback"
_REFUSED = {
    "model": _SETTING_INSTEAD,
    "model-url": _SETTING_INSTEAD,
    "hf-repo": _SETTING_INSTEAD,
    "docker-repo": _SETTING_INSTEAD,
    "host": _OURS_ALONE,
    "port": _OURS_ALONE,
    "api-key": _OURS_ALONE,
    "api-key-file": _OURS_ALONE,
    "api-prefix": _OURS_ALONE,
    "ssl-key-file": _OURS_ALONE,
    "ssl-cert-file": _OURS_ALONE,
}
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9-]*")


def canonical(name: str) -> str:
    """The one spelling of a flag: long, with dashes between its words and none before it."""
    bare = name.strip().lstrip("-").replace("_", "-")
    return _SPELLINGS.get(bare, bare)


def flags_for(model: Model, port: int) -> Flags:
    """Every flag the model is started with, by canonical name. Raises UnsupportedError for one that may not be set."""
    theirs = _users(model)
    decided = {_subject(name) for name in theirs}
    ours = {name: value for name, value in _ours(model, port, theirs).items() if _subject(name) not in decided}
    return ours | theirs


def to_arguments(flags: Mapping[str, FlagValue]) -> list[str]:
    return [argument for name, value in flags.items() for argument in _one(f"--{name}", value)]


def _one(flag: str, value: FlagValue) -> Iterable[str]:
    match value:
        case True:
            return (flag,)
        case False:
            return ()
        case list():
            return [argument for item in value for argument in (flag, str(item))]
        case _:
            return (flag, str(value))


def _users(model: Model) -> Flags:
    flags: Flags = {}
    spelled: dict[str, str] = {}
    for spelling, value in model.settings.flags.items():
        name = canonical(spelling)
        if not _NAME.fullmatch(name):
            raise UnsupportedError(
                f"model '{model.name}': '{spelling}' is not the name of a flag", hint="mend its flags"
            )
        if name in _REFUSED:
            raise UnsupportedError(f"model '{model.name}': the flag '{spelling}' cannot be set", hint=_REFUSED[name])
        if name in flags:
            both = f"'{spelled[name]}' and '{spelling}'"
            raise UnsupportedError(f"model '{model.name}': the flags {both} are the same", hint="keep one of them")
        flags[name], spelled[name] = value, spelling
    return flags


def _subject(name: str) -> str:
    """What a flag decides: flags of one subject exclude each other."""
    return {"chat-template-file": "chat-template", "rerank": "pooling"}.get(name, name.removeprefix("no-"))


def _ours(model: Model, port: int, theirs: Flags) -> Flags:
    settings, slots = model.settings, theirs.get("parallel")
    if isinstance(slots, bool) or not isinstance(slots, int) or slots < 1:
        slots = settings.parallel
    flags: Flags = {"model": os.path.abspath(model.path), "host": "127.0.0.1", "port": port}
    if "," not in model.name:  # which separates aliases
        flags["alias"] = model.name
    flags["ctx-size"] = model.context * slots
    flags["parallel"] = slots
    if settings.gpu_layers != "auto":
        flags["n-gpu-layers"] = ALL_LAYERS if settings.gpu_layers == "all" else settings.gpu_layers
    flags["jinja"] = True
    if settings.chat_template:
        flags |= _chat_template(model.name, settings.chat_template)
    if model.mmproj is not None:
        flags["mmproj"] = os.path.abspath(model.mmproj)
    if Capability.EMBEDDING in model.capabilities:
        flags["embeddings"] = True
        if Capability.EMBEDDING not in model.details.capabilities:
            flags["pooling"] = "mean"
        flags["batch-size"] = flags["ubatch-size"] = min(max(model.context, 512), _EMBEDDING_BATCH)
    return flags | {"no-webui": True, "slots": True}


def _chat_template(model: str, template: str) -> Flags:
    path = os.path.abspath(os.path.expanduser(template))
    looks_like_path = os.sep in template or template.endswith((".jinja", ".jinja2", ".j2"))
    if not looks_like_path:
        return {"chat-template": template}
    if not os.path.isfile(path):
        raise UnsupportedError(f"model '{model}': there is no chat template {path}", hint="check its chat_template")
    return {"chat-template-file": path}
