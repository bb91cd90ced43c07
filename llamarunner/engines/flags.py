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
    "C": "cpu-mask",
    "Cr": "cpu-range",
    "a": "alias",
    "b": "batch-size",
    "c": "ctx-size",
    "cache-type-k-draft": "spec-draft-type-k",
    "cache-type-v-draft": "spec-draft-type-v",
    "cb": "cont-batching",
    "cd": "ctx-size-draft",
    "cmoe": "cpu-moe",
    "cms": "checkpoint-min-step",
    "cpu-moe-draft": "spec-draft-cpu-moe",
    "cram": "cache-ram",
    "ctk": "cache-type-k",
    "ctkd": "spec-draft-type-k",
    "ctv": "cache-type-v",
    "ctvd": "spec-draft-type-v",
    "ctxcp": "ctx-checkpoints",
    "dev": "device",
    "devd": "spec-draft-device",
    "device-draft": "spec-draft-device",
    "dio": "direct-io",
    "draft": "spec-draft-n-max",
    "draft-max": "spec-draft-n-max",
    "draft-min": "spec-draft-n-min",
    "draft-n": "spec-draft-n-max",
    "draft-n-min": "spec-draft-n-min",
    "draft-p-min": "spec-draft-p-min",
    "draft-p-split": "spec-draft-p-split",
    "dt": "defrag-thold",
    "e": "escape",
    "embedding": "embeddings",
    "fa": "flash-attn",
    "fitc": "fit-ctx",
    "fitt": "fit-target",
    "gpu-layers": "n-gpu-layers",
    "gpu-layers-draft": "spec-draft-ngl",
    "hf": "hf-repo",
    "hfr": "hf-repo",
    "j": "json-schema",
    "jf": "json-schema-file",
    "kvo": "kv-offload",
    "kvu": "kv-unified",
    "l": "logit-bias",
    "lm": "load-mode",
    "log-verbose": "verbose",
    "log-verbosity": "verbosity",
    "lv": "verbosity",
    "lzm": "lazy-mode",
    "m": "model",
    "md": "spec-draft-model",
    "mg": "main-gpu",
    "mm": "mmproj",
    "model-draft": "spec-draft-model",
    "mu": "model-url",
    "n": "predict",
    "n-cpu-moe-draft": "spec-draft-n-cpu-moe",
    "n-gpu-layers-draft": "spec-draft-ngl",
    "n-predict": "predict",
    "ncffn": "n-cpu-ffn",
    "ncmoe": "n-cpu-moe",
    "ngl": "n-gpu-layers",
    "ngld": "spec-draft-ngl",
    "nkvo": "no-kv-offload",
    "no-kvu": "no-kv-unified",
    "no-ui": "no-webui",
    "nocb": "no-cont-batching",
    "np": "parallel",
    "nr": "no-repack",
    "ot": "override-tensor",
    "otd": "spec-draft-override-tensor",
    "override-tensor-draft": "spec-draft-override-tensor",
    "p-split": "spec-draft-p-split",
    "ps": "spec-draft-p-split",
    "r": "reverse-prompt",
    "rea": "reasoning",
    "reranking": "rerank",
    "s": "seed",
    "sampler-seq": "sampling-seq",
    "sm": "split-mode",
    "sp": "special",
    "sps": "slot-prompt-similarity",
    "swa-checkpoints": "ctx-checkpoints",
    "t": "threads",
    "tb": "threads-batch",
    "tbd": "spec-draft-threads-batch",
    "td": "spec-draft-threads",
    "temperature": "temp",
    "threads-batch-draft": "spec-draft-threads-batch",
    "threads-draft": "spec-draft-threads",
    "to": "timeout",
    "top-n-sigma": "top-nsigma",
    "ts": "tensor-split",
    "typical-p": "typical",
    "ub": "ubatch-size",
    "ui": "webui",
    "ui-config": "webui-config",
    "v": "verbose",
}
_SHORTEST = 5  # of a long spelling that came or went; the shorter ones never stand alone, but for "ui"
_LONG: dict[str, tuple[str, ...]] = {
    canonical: tuple(
        spelling
        for spelling, of in _SPELLINGS.items()
        if of == canonical and (len(spelling) >= _SHORTEST or spelling == "ui")
    )
    for canonical in set(_SPELLINGS.values())
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


def long_spellings(name: str) -> tuple[str, ...]:
    """What other builds call the flag of this canonical name."""
    return _LONG.get(name, ())


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
    if template := settings.chat_template or model.chat_template:
        flags |= _chat_template(model.name, template)
    if model.adapters:
        flags["lora"] = ",".join(os.path.abspath(adapter) for adapter in model.adapters)
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
    if template == "chatml":
        return {"chat-template": template}
    if not looks_like_path:
        # a program that reads Jinja takes any other name for the text of a template, and would answer to that word
        return {"jinja": False, "no-jinja": True, "chat-template": template}
    if not os.path.isfile(path):
        raise UnsupportedError(f"model '{model}': there is no chat template {path}", hint="check its chat_template")
    return {"chat-template-file": path}
