"""What llama.cpp itself projects that a model needs: `llama-fit-params`, which newer builds bring along beside
llama-server, reads the header, plans the buffers and prints their sizes without loading anything.

It is asked for the CPU alone, so that no GPU is touched: the context's and the computation's sizes are what it knows
better than our formulas, and where they lie is ours to decide."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llamarunner import paths
from llamarunner.catalog.catalog import Model
from llamarunner.config.schema import EngineConfig
from llamarunner.engines.flags import Flags, canonical, flags_for, to_arguments
from llamarunner.engines.kept import KeptAnswers
from llamarunner.engines.known_flags import as_known
from llamarunner.engines.probe import identity_of, probe, run_bounded

logger = logging.getLogger(__name__)

MIB = 1024**2
TOOL = "llama-fit-params"
_WITHIN_S = 10.0
_MOST_KEPT = 1000
# "Host 1918 224 301": model, context and computation in MiB; one line for each device, the host's last
_ROW = re.compile(r"^(\S.*?) +(\d+) +(\d+) +(\d+) *$", re.MULTILINE)
_HOST = "Host"
_SIZING = frozenset(
    (
        "model", "ctx-size", "parallel", "batch-size", "ubatch-size", "cache-type-k", "cache-type-v", "flash-attn",
        "swa-full", "kv-unified", "no-kv-unified", "override-kv", "rope-scaling", "rope-scale", "rope-freq-base",
        "rope-freq-scale", "yarn-orig-ctx",
    )
)  # fmt: skip
_NO_GPU = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "GGML_VK_VISIBLE_DEVICES": ""}


@dataclass(frozen=True, slots=True)
class Projection:
    """Bytes in RAM, without any GPU."""

    context: int
    compute: int


def find_tool(server: str, config: EngineConfig) -> str | None:
    """Beside the server it belongs to, else where programs are looked for."""
    beside = os.path.join(os.path.dirname(os.path.realpath(server)), TOOL)
    found = beside if os.access(beside, os.X_OK) else shutil.which(TOOL, path=config.env.get("PATH"))
    return os.path.abspath(found) if found else None


def project(server: str, config: EngineConfig, model: Model) -> Projection | None:
    """What the tool says, asked once for each file, flags and build; None where there is none or it cannot say.
    Blocks for some seconds."""
    tool = find_tool(server, config)
    if tool is None:
        return None
    flags = {name: value for name, value in flags_for(model, 0).items() if name in _SIZING}
    kept, key = KeptAnswers(paths.cache_dir() / "projections.json", _MOST_KEPT), _key(tool, model, flags)
    if (answer := _recalled(kept.get(key))) is not None:
        return answer
    answer = _ask(tool, config.env, model, flags)
    if answer is not None:
        kept.put(key, [answer.context, answer.compute])
    return answer


def parse_projection(output: str) -> Projection | None:
    """Raises nothing: what it does not understand is no projection."""
    rows = [(name, int(context), int(compute)) for name, _, context, compute in _ROW.findall(output)]
    host = next((row for row in reversed(rows) if row[0] == _HOST), None)
    if host is None or (len(rows) > 1 and any(context for name, context, _ in rows if name != _HOST)):
        return None  # part of it lies on a device that we meant to hide
    return Projection(host[1] * MIB, host[2] * MIB)


def _ask(tool: str, env: Mapping[str, str], model: Model, flags: Flags) -> Projection | None:
    known = probe(tool, {**env, **_NO_GPU})
    if known.problem or not {"fit-print", "model"} <= known.flags:
        logger.debug("%s does not tell sizes: %s", tool, known.problem or "it has no --fit-print")
        return None
    slots = flags.get("parallel", 1)
    missing = [name for name in flags if name != "parallel" and not known.knows(name)]
    if missing or (slots != 1 and not known.knows("parallel")):  # it would answer for another model
        logger.debug("%s cannot be asked about %s: it does not take %s", tool, model.name, missing or "parallel")
        return None
    written = {canonical(name): name for name in model.settings.flags}
    asked = {name: value for name, value in flags.items() if known.knows(name)}
    arguments = to_arguments({**as_known(asked, known, written, model.name), "n-gpu-layers": 0, "fit-print": "on"})
    try:
        code, output = run_bounded([tool, *arguments], {**os.environ, **env, **_NO_GPU}, _WITHIN_S)
    except OSError as error:  # a TimeoutError is one
        logger.debug("%s did not say what %s needs: %r", tool, model.name, error)
        return None
    answer = parse_projection(output) if code == 0 else None
    if answer is None:
        logger.debug("%s did not say what %s needs: it ended with %s", tool, model.name, code)
    return answer


def _recalled(answer: object) -> Projection | None:
    match answer:
        case [int(context), int(compute)]:
            return Projection(context, compute)
        case _:
            return None


def _key(tool: str, model: Model, flags: Flags) -> str:
    program = [tool, *identity_of(tool)]
    file = [str(Path(model.path)), model.size_bytes, model.modified_at]
    identity = json.dumps([program, file, flags], sort_keys=True)
    return hashlib.sha256(identity.encode("utf-8", "surrogateescape")).hexdigest()[:32]
