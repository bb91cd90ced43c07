"""One model in one process: llama.cpp's own HTTP server, run by xllamacpp. `builtin.py` starts this file by its path.

It takes llama-server's flags, as far as xllamacpp has a place for them, and its API key from LLAMA_API_KEY. It imports
nothing of ours, so that it starts quickly and stays small. Exit codes: 0 asked to end, 1 could not load, 2 bad flags.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

API_KEY_VARIABLE = "LLAMA_API_KEY"


class FlagError(ValueError):
    """One sentence about a flag that cannot be used."""


class Enumerated(NamedTuple):
    """A member of an enumeration of xllamacpp, by name: the module itself is only imported to run a model."""

    enumeration: str
    member: str


class Flag(NamedTuple):
    """Where a flag's value goes in CommonParams. Without `convert` the flag takes no value and means `constant`."""

    attribute: str
    convert: Callable[[str], Any] | None = None
    constant: Any = True


class Setting(NamedTuple):
    attribute: str
    value: Any


def _int(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise FlagError("a whole number") from None
    if not -(2**31) <= value < 2**31:
        raise FlagError("a number of at most 31 bits")
    return value


def _seed(text: str) -> int:
    value = int(text) if text.removeprefix("-").isdecimal() else -2
    if not -1 <= value < 2**32:
        raise FlagError("a whole number up to 4294967295, or -1")
    return value % 2**32


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise FlagError("a number") from None


def _switch(text: str) -> bool:
    if text not in ("on", "off"):
        raise FlagError("on or off")
    return text == "on"


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _floats(text: str) -> list[float]:
    return [_float(part) for part in _names(text)]


def _mebibytes(text: str) -> list[int]:
    return [_int(part) * 1024**2 for part in _names(text)]


def _gpu_layers(text: str) -> int:
    return {"auto": -1, "all": 999}[text] if text in ("auto", "all") else _int(text)


def _template_arguments(text: str) -> dict[str, str]:
    """llama.cpp keeps each argument as JSON text."""
    import json  # 10 ms that few starts need

    try:
        arguments = json.loads(text)
    except ValueError:
        arguments = None
    if not isinstance(arguments, dict):
        raise FlagError("a JSON object")
    return {name: json.dumps(value) for name, value in arguments.items()}


def _file_text(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, ValueError) as error:
        raise FlagError(f"a readable text file ({error})") from None


def _one_of(enumeration: str, prefix: str, names: str, **members: str) -> Callable[[str], Enumerated]:
    """Converts one of `names`; its member is called so in capitals unless `members` has another name for it."""
    allowed = {name: members.get(name, name.upper()) for name in names.split()}

    def convert(text: str) -> Enumerated:
        if text not in allowed:
            raise FlagError(f"one of {', '.join(allowed)}")
        return Enumerated(enumeration, prefix + allowed[text])

    return convert


_cache_type = _one_of("ggml_type", "GGML_TYPE_", "f32 f16 bf16 q8_0 q4_0 q4_1 iq4_nl q5_0 q5_1")
_flash_attention = _one_of(
    "llama_flash_attn_type", "LLAMA_FLASH_ATTN_TYPE_", "on off auto", on="ENABLED", off="DISABLED"
)
_pooling = _one_of("llama_pooling_type", "LLAMA_POOLING_TYPE_", "none mean cls last rank")
_load_mode = _one_of(
    "llama_load_mode",
    "LLAMA_LOAD_MODE_",
    "auto none mmap mlock mmap+mlock dio",
    **{"mmap+mlock": "MMAP_MLOCK"},
    dio="DIRECT_IO",
)
_priority = _one_of(
    "ggml_sched_priority",
    "GGML_SCHED_PRIO_",
    "-1 0 1 2 3",
    **{"-1": "LOW", "0": "NORMAL", "1": "MEDIUM", "2": "HIGH", "3": "REALTIME"},
)

FLAGS: dict[str, Flag] = {
    # the model
    "model": Flag("model.path", str),
    "alias": Flag("model_alias", lambda text: set(_names(text))),
    "mmproj": Flag("mmproj.path", str),
    "mmproj-offload": Flag("mmproj_use_gpu"),
    "no-mmproj-offload": Flag("mmproj_use_gpu", constant=False),
    "image-min-tokens": Flag("image_min_tokens", _int),
    "image-max-tokens": Flag("image_max_tokens", _int),
    "lora": Flag("lora_adapters", _names),
    "check-tensors": Flag("check_tensors"),
    "load-mode": Flag("load_mode", _load_mode),
    "no-mmap": Flag("load_mode", constant=Enumerated("llama_load_mode", "LLAMA_LOAD_MODE_NONE")),
    "mlock": Flag("load_mode", constant=Enumerated("llama_load_mode", "LLAMA_LOAD_MODE_MMAP_MLOCK")),
    "warmup": Flag("warmup"),
    "no-warmup": Flag("warmup", constant=False),
    # context and slots
    "ctx-size": Flag("n_ctx", _int),
    "parallel": Flag("n_parallel", _int),
    "batch-size": Flag("n_batch", _int),
    "ubatch-size": Flag("n_ubatch", _int),
    "keep": Flag("n_keep", _int),
    "predict": Flag("n_predict", _int),
    "kv-unified": Flag("kv_unified"),
    "no-kv-unified": Flag("kv_unified", constant=False),
    "cache-type-k": Flag("cache_type_k", _cache_type),
    "cache-type-v": Flag("cache_type_v", _cache_type),
    "cache-ram": Flag("cache_ram_mib", _int),
    "cache-reuse": Flag("n_cache_reuse", _int),
    "cache-prompt": Flag("cache_prompt"),
    "no-cache-prompt": Flag("cache_prompt", constant=False),
    "context-shift": Flag("ctx_shift"),
    "no-context-shift": Flag("ctx_shift", constant=False),
    "cont-batching": Flag("cont_batching"),
    "no-cont-batching": Flag("cont_batching", constant=False),
    "ctx-checkpoints": Flag("n_ctx_checkpoints", _int),
    "slot-prompt-similarity": Flag("slot_prompt_similarity", _float),
    "slot-save-path": Flag("slot_save_path", str),
    "swa-full": Flag("swa_full"),
    "flash-attn": Flag("flash_attn_type", _flash_attention),
    "rope-scaling": Flag(
        "rope_scaling_type", _one_of("llama_rope_scaling_type", "LLAMA_ROPE_SCALING_TYPE_", "none linear yarn")
    ),
    "rope-freq-base": Flag("rope_freq_base", _float),
    "rope-freq-scale": Flag("rope_freq_scale", _float),
    "yarn-orig-ctx": Flag("yarn_orig_ctx", _int),
    "yarn-ext-factor": Flag("yarn_ext_factor", _float),
    "yarn-attn-factor": Flag("yarn_attn_factor", _float),
    "yarn-beta-slow": Flag("yarn_beta_slow", _float),
    "yarn-beta-fast": Flag("yarn_beta_fast", _float),
    # devices and threads
    "n-gpu-layers": Flag("n_gpu_layers", _gpu_layers),
    "main-gpu": Flag("main_gpu", _int),
    "split-mode": Flag("split_mode", _one_of("llama_split_mode", "LLAMA_SPLIT_MODE_", "none layer row tensor")),
    "tensor-split": Flag("tensor_split", _floats),
    "override-tensor": Flag("tensor_buft_overrides", str),
    "fit": Flag("fit_params", _switch),
    "fit-target": Flag("fit_params_target", _mebibytes),
    "fit-ctx": Flag("fit_params_min_ctx", _int),
    "kv-offload": Flag("no_kv_offload", constant=False),
    "no-kv-offload": Flag("no_kv_offload"),
    "op-offload": Flag("no_op_offload", constant=False),
    "no-op-offload": Flag("no_op_offload"),
    "repack": Flag("no_extra_bufts", constant=False),
    "no-repack": Flag("no_extra_bufts"),
    "no-host": Flag("no_host"),
    "threads": Flag("cpuparams.n_threads", _int),
    "threads-batch": Flag("cpuparams_batch.n_threads", _int),
    "threads-http": Flag("n_threads_http", _int),
    "prio": Flag("cpuparams.priority", _priority),
    "poll": Flag("cpuparams.poll", _int),
    "numa": Flag("numa", _one_of("ggml_numa_strategy", "GGML_NUMA_STRATEGY_", "distribute isolate numactl")),
    # chat and embeddings
    "jinja": Flag("use_jinja"),
    "no-jinja": Flag("use_jinja", constant=False),
    "chat-template": Flag("chat_template", str),
    "chat-template-file": Flag("chat_template", _file_text),
    "chat-template-kwargs": Flag("default_template_kwargs", _template_arguments),
    "reasoning-format": Flag(
        "reasoning_format",
        _one_of(
            "common_reasoning_format",
            "COMMON_REASONING_FORMAT_",
            "none auto deepseek deepseek-legacy",
            **{"deepseek-legacy": "DEEPSEEK_LEGACY"},
        ),
    ),
    "prefill-assistant": Flag("prefill_assistant"),
    "no-prefill-assistant": Flag("prefill_assistant", constant=False),
    "embeddings": Flag("embedding"),
    "pooling": Flag("pooling_type", _pooling),
    "embd-normalize": Flag("embd_normalize", _int),
    # samplers a request does not name
    "seed": Flag("sampling.seed", _seed),
    "temp": Flag("sampling.temp", _float),
    "top-k": Flag("sampling.top_k", _int),
    "top-p": Flag("sampling.top_p", _float),
    "min-p": Flag("sampling.min_p", _float),
    "typical": Flag("sampling.typ_p", _float),
    "repeat-penalty": Flag("sampling.penalty_repeat", _float),
    "repeat-last-n": Flag("sampling.penalty_last_n", _int),
    "presence-penalty": Flag("sampling.penalty_present", _float),
    "frequency-penalty": Flag("sampling.penalty_freq", _float),
    # the server
    "host": Flag("hostnames", _names),
    "port": Flag("port", _int),
    "timeout": Flag("timeout_read", _int),
    "sse-ping-interval": Flag("sse_ping_interval", _int),
    "media-path": Flag("media_path", str),
    "slots": Flag("endpoint_slots"),
    "no-slots": Flag("endpoint_slots", constant=False),
    "metrics": Flag("endpoint_metrics"),
    "props": Flag("endpoint_props"),
    "webui": Flag("ui"),
    "no-webui": Flag("ui", constant=False),
    "verbosity": Flag("verbosity", _int),
}


def parse(arguments: Sequence[str]) -> list[Setting]:
    """The settings that `arguments` stand for, in their order. Raises FlagError."""
    settings, left = [], list(reversed(arguments))
    while left:
        argument = left.pop()
        flag = FLAGS.get(argument.removeprefix("--")) if argument.startswith("--") else None
        if flag is None:
            from difflib import get_close_matches

            near = get_close_matches(argument.lstrip("-"), FLAGS, n=1)
            raise FlagError(f"unknown flag {argument}" + (f" (did you mean --{near[0]}?)" if near else ""))
        value = flag.constant
        if flag.convert is not None:
            if not left:
                raise FlagError(f"{argument} needs a value")
            text = left.pop()
            try:
                value = flag.convert(text)
            except FlagError as wanted:
                raise FlagError(f"{argument} wants {wanted}, not '{text}'") from None
        settings.append(Setting(flag.attribute, value))
    return settings


def _apply(xllamacpp: Any, params: Any, setting: Setting) -> None:
    *path, name = setting.attribute.split(".")
    target, value = params, setting.value
    for part in path:
        target = getattr(target, part)
    if isinstance(value, Enumerated):
        value = getattr(getattr(xllamacpp, value.enumeration), value.member)
    elif name == "tensor_split":  # of a fixed length
        value = (value + [0.0] * len(params.tensor_split))[: len(params.tensor_split)]
    elif name == "lora_adapters":
        value = [*params.lora_adapters, *(xllamacpp.CommonAdapterLoraInfo(path, 1.0) for path in value)]
    elif name == "timeout_read":
        params.timeout_write = value
    setattr(target, name, value)


def _params(xllamacpp: Any, settings: Sequence[Setting], api_key: str) -> Any:
    params = xllamacpp.CommonParams()
    params.ui = False
    params.endpoint_slots = params.endpoint_metrics = True
    for setting in settings:
        try:
            _apply(xllamacpp, params, setting)
        except (AssertionError, OverflowError, TypeError, ValueError) as error:
            raise FlagError(f"llama.cpp does not take {setting.value!r} for {setting.attribute}: {error}") from None
    params.api_keys = [api_key]
    return params


def _fail(code: int, message: str) -> NoReturn:
    os.write(2, f"error: {message}\n".encode("utf-8", "backslashreplace"))
    os._exit(code)  # llama.cpp's threads do not survive the interpreter's own way out


def _finish_log(xllamacpp: Any) -> None:
    """llama.cpp writes its log from a thread of its own: wait for it, so that our last line is not within its."""
    import ctypes

    library = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
    try:
        logger, pause = library._Z15common_log_mainv, library._Z16common_log_pauseP10common_log
    except AttributeError:  # a build that keeps its symbols to itself: the lines may mix
        return
    logger.restype = ctypes.c_void_p
    pause(ctypes.c_void_p(logger()))


def _serve(xllamacpp: Any, params: Any) -> None:
    """Load, serve until SIGTERM or SIGINT. Until the model is loaded either signal ends the process at once."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    _server = xllamacpp.Server(params)  # returns once it serves, and serves as long as it is referred to
    # Signals may reach any of llama.cpp's threads; the wake-up descriptor tells this one whichever it was.
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    os.read(reader, 1)
    os._exit(0)  # without llama.cpp's own way out, which waits for running answers; the system frees all it had


def main(arguments: Sequence[str]) -> None:
    try:
        settings = parse(arguments)
    except FlagError as error:
        _fail(2, str(error))
    api_key = os.environ.pop(API_KEY_VARIABLE, "")
    if not api_key:
        _fail(2, f"{API_KEY_VARIABLE} is not set")
    path = next((setting.value for setting in reversed(settings) if setting.attribute == "model.path"), "")
    if not path:
        _fail(2, "--model is not given")
    try:
        import xllamacpp
    except ImportError as error:
        _fail(1, f"xllamacpp cannot be imported: {error}")
    try:
        params = _params(xllamacpp, settings, api_key)
    except FlagError as error:
        _fail(2, str(error))
    try:
        _serve(xllamacpp, params)
    except RuntimeError as error:
        _finish_log(xllamacpp)
        if not os.path.exists(path):
            _fail(1, f"there is no file {path}")
        _fail(1, f"llama.cpp could not serve {path} (its own lines above say why): {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
