"""How much memory a model needs, told from its header and flags before it ever ran: `estimate` gives a `Need`, which
says what lies where for any number of layers on GPUs. Pure but for `companions`, which reads the headers of a projector
and a draft model. Bytes throughout.

The formulas follow llama.cpp (llama-model: which layer lies where; llama-graph: what a batch of tokens needs);
`bench/estimates.py` holds them against real processes. What is measured takes their place: see `footprints.py`."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path

from llamarunner.catalog.catalog import Model, ModelDetails, Weights
from llamarunner.catalog.details import read_details
from llamarunner.config.values import FlagValue
from llamarunner.engines.flags import ALL_LAYERS, canonical, flags_for
from llamarunner.errors import UnsupportedError
from llamarunner.runners.caches import Caches, CacheSettings, Hyperparameters, caches

MIB = 1024**2

# Of the engine's process, measured with the built-in engine on x86-64 Linux (bench/estimates.py): libraries, threads
# and buffers, and for each token and merge of the vocabulary its text with its places in llama.cpp's tables.
PROCESS_BYTES = 30 * MIB
TOKEN_BYTES = 200
MERGE_BYTES = 280
# A CUDA context with its kernels and cuBLAS workspace takes 300 to 500 MiB of each card it touches, and the libraries
# some of the host's memory. From reports: there was no card to measure.
GPU_CONTEXT_BYTES = 500 * MIB
GPU_LIBRARY_BYTES = 250 * MIB

# llama.cpp's CPU backend copies matrices of these types into an order that suits AVX2; the mapped file stays mapped.
_REPACKED = ("Q4_0", "Q4_K", "IQ4_NL", "MXFP4")
_PROMPT_CACHE_MIB = 8192  # llama-server's default for --cache-ram
_DRAFT_FLAG = "spec-draft-model"
_DRAFT_INHERITS = ("ctx-size", "parallel", "kv-unified")


@dataclass(frozen=True, slots=True)
class Layer:
    weights: int  # without experts
    experts: int
    cache: int


@dataclass(frozen=True, slots=True)
class Wishes:
    """Where the configuration wants the model. Placement obeys."""

    gpu_layers: int | None = None  # None: as many as fit
    tensor_split: tuple[float, ...] = ()
    devices: tuple[str, ...] | None = None  # the engine's names ("CUDA0"); () for none of them
    main_gpu: int | None = None  # where split_mode is "none"
    split_mode: str = "layer"
    visible: str | None = None  # CUDA_VISIBLE_DEVICES of the model's environment


@dataclass(frozen=True, slots=True)
class Allocation:
    ram: int
    gpus: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Need:
    """Layers are counted as llama.cpp's --n-gpu-layers does: the output matrix is one more, and the last come first to
    the GPU, so that n of them are the output and the last n - 1 layers."""

    model: str
    layers: tuple[Layer, ...]
    input: int  # the token embedding and odd tensors, which never leave RAM
    output: int  # on a GPU, with its copy of the embedding where that is the output matrix too
    cpu_weights: int  # all of them in RAM, copies for the CPU's sake included
    compute: int  # of one batch, on each device that has layers
    host_compute: int  # of one batch, in RAM beside GPUs
    logits: int
    process: int
    snapshots: int  # one of each slot; see `prompt_cache`
    projector: int = 0
    projector_on_gpu: bool = True
    draft: Need | None = None
    cache_on_gpu: bool = True
    cpu_experts: int = 0  # of so many layers, from the first, the experts stay in RAM
    prompt_cache: int = (
        0  # limit of what old prompts may take of RAM in time; in no total: the measured figures have it
    )
    wishes: Wishes = Wishes()
    ram_correction: int = 0  # what was measured less what was estimated
    gpu_correction: int = 0  # likewise, of each GPU
    # worked out once: placing asks for them again and again
    units: int = field(init=False, repr=False, compare=False)
    on_first_gpu: int = field(init=False, repr=False, compare=False)
    on_each_gpu: int = field(init=False, repr=False, compare=False)
    _ends: tuple[int, ...] = field(init=False, repr=False, compare=False)  # of the units on a GPU, from the first
    _ram_from: tuple[int, ...] = field(init=False, repr=False, compare=False)  # of layers, by how many stay in RAM

    def __post_init__(self) -> None:
        object.__setattr__(self, "units", len(self.layers) + 1)
        draft = sum(self.draft.unit_sizes()) + self.draft.compute if self.draft else 0
        object.__setattr__(self, "on_first_gpu", draft + (self.projector if self.projector_on_gpu else 0))
        object.__setattr__(self, "on_each_gpu", max(self.compute + GPU_CONTEXT_BYTES + self.gpu_correction, 0))
        object.__setattr__(self, "_ends", (0, *accumulate(self.unit_sizes())))
        kept = 0
        whole: list[int] = [0]
        for layer in self.layers:
            kept += layer.weights + layer.experts + layer.cache
            whole.append(kept)
        beside = 0
        rest: list[int] = [0]
        for number in range(len(self.layers) - 1, -1, -1):
            layer = self.layers[number]
            beside += layer.experts if number < self.cpu_experts else 0
            beside += 0 if self.cache_on_gpu else layer.cache
            rest.append(beside)
        rest.reverse()
        object.__setattr__(self, "_ram_from", tuple(map(sum, zip(whole, rest, strict=True))))

    @property
    def ends(self) -> tuple[int, ...]:
        """Where each unit ends, counted in bytes of GPU memory from the first."""
        return self._ends

    @property
    def least(self) -> int:
        """Less memory than this, of all devices together, never holds it."""
        return self._ends[-1]

    @property
    def cache(self) -> int:
        return sum(layer.cache for layer in self.layers)

    def unit_sizes(self) -> tuple[int, ...]:
        """What each layer takes of a GPU it lies on; the output is the last."""
        sizes = []
        for number, layer in enumerate(self.layers):
            experts = 0 if number < self.cpu_experts else layer.experts
            sizes.append(layer.weights + experts + (layer.cache if self.cache_on_gpu else 0))
        return (*sizes, self.output)

    def on_cpu(self) -> int:
        """RAM, without any GPU."""
        draft = self.draft.on_cpu() - self.draft.process if self.draft else 0
        ours = self.cpu_weights + self.cache + self.compute + self.logits + self.snapshots + self.process
        return max(ours + self.projector + draft + self.ram_correction, 0)

    def on_gpus(self, shares: Sequence[int]) -> Allocation:
        """With so many layers on each GPU."""
        offloaded = sum(shares)
        if not offloaded:
            return Allocation(self.on_cpu(), (0,) * len(shares))
        ends, at, gpus = self._ends, self.units - offloaded, []
        for share in shares:
            gpus.append(ends[at + share] - ends[at] + self.on_each_gpu if share else 0)
            at += share
        first = next(number for number, share in enumerate(shares) if share)
        gpus[first] += self.on_first_gpu
        return Allocation(self.ram_beside(offloaded), tuple(gpus))

    def ram_beside(self, offloaded: int) -> int:
        """RAM, with so many layers on GPUs."""
        kept = self.units - offloaded
        layers = self._ram_from[max(kept, 0)]
        in_ram = self.compute if kept > 0 else self.host_compute
        projector = 0 if self.projector_on_gpu else self.projector
        draft = self.draft.input + self.draft.logits + self.draft.host_compute if self.draft else 0
        ours = self.input + layers + in_ram + self.logits + self.snapshots + self.process + GPU_LIBRARY_BYTES
        return max(ours + projector + draft + self.ram_correction, 0)

    def projected(self, context: int, compute: int) -> Need:
        """With the sizes that the engine itself projects of the cache and of a batch on the CPU."""
        ours = self.cache
        if not ours or not context:
            return replace(self, compute=compute)
        layers = tuple(replace(layer, cache=layer.cache * context // ours) for layer in self.layers)
        return replace(self, layers=layers, compute=compute)

    def corrected(self, estimated: Allocation, measured: Allocation) -> Need:
        """With what one placement was measured to take, where each figure that was measured is not 0."""
        used = [(e, m) for e, m in zip(estimated.gpus, measured.gpus, strict=True) if e and m]
        gpu = max((m - e for e, m in used), default=0)
        ram = measured.ram - estimated.ram if measured.ram else 0
        return replace(self, ram_correction=self.ram_correction + ram, gpu_correction=self.gpu_correction + gpu)


@dataclass(frozen=True, slots=True)
class Companions:
    """What is loaded beside a model."""

    projector: ModelDetails | None = None
    draft: Model | None = None


def companions(model: Model) -> Companions:
    """Reads headers, so it blocks. Raises ModelFileError where a file named by the model cannot be read."""
    projector = read_details(model.mmproj) if model.mmproj is not None else None
    theirs = {canonical(name): value for name, value in model.settings.flags.items()}
    path = str(theirs.get(_DRAFT_FLAG) or "")
    if not path:
        return Companions(projector)
    inherited = {name: value for name, value in model.settings.flags.items() if canonical(name) in _DRAFT_INHERITS}
    settings = model.settings.model_copy(update={"flags": inherited})
    file = Path(os.path.expanduser(path))
    return Companions(projector, Model("draft", file, settings, read_details(file)))


def estimate(model: Model, beside: Companions | None = None, *, every_logit: bool = False) -> Need:
    """`every_logit`: the engine keeps room for the logits of each token of a batch, as llama-server did until 2026, and
    not only of each slot. Raises UnsupportedError for a flag that may not be set."""
    flags, details = flags_for(model, 0), model.details
    beside = beside or Companions()
    known, weights = Hyperparameters(details), details.weights
    cache_settings = _cache_settings(flags, details)
    kept = caches(details, cache_settings)
    slots, ubatch = cache_settings.slots, cache_settings.ubatch
    rows = ubatch if every_logit or flags.get("embeddings") is True else slots
    compute, host = _compute(known, kept, ubatch, rows * details.vocabulary, is_flash=flags.get("flash-attn") != "off")
    is_tied = weights.output < 16 * known.width  # a norm's worth of bytes: there is no matrix
    return Need(
        model=model.name,
        layers=tuple(map(Layer, weights.layers, weights.experts, kept.layers)),
        input=weights.embedding + weights.other,
        output=weights.output + (weights.embedding if is_tied and known.is_causal else 0),
        cpu_weights=weights.total + _repacked(weights, flags),
        compute=compute,
        host_compute=host,
        logits=4 * slots * details.vocabulary,
        process=PROCESS_BYTES + TOKEN_BYTES * details.vocabulary + MERGE_BYTES * details.merges,
        snapshots=0 if kept.rewindable or _number(flags, "ctx-checkpoints", 1) == 0 else slots * kept.snapshot,
        projector=_projector(beside.projector) if beside.projector and not flags.get("no-mmproj") else 0,
        projector_on_gpu=not flags.get("no-mmproj-offload"),
        draft=estimate(beside.draft, every_logit=every_logit) if beside.draft else None,
        cache_on_gpu=not flags.get("no-kv-offload"),
        cpu_experts=len(weights.layers) if flags.get("cpu-moe") else _number(flags, "n-cpu-moe", 0),
        prompt_cache=_prompt_cache(flags),
        wishes=_wishes(model, flags),
    )


def _cache_settings(flags: Mapping[str, FlagValue], details: ModelDetails) -> CacheSettings:
    slots = max(_number(flags, "parallel", 1), 1)
    context = _number(flags, "ctx-size", 0) or details.context_length or 4096
    batch = min(_number(flags, "batch-size", 2048) or 2048, context)
    return CacheSettings(
        context=context,
        slots=slots,
        unified=flags.get("kv-unified") is True,
        ubatch=max(min(_number(flags, "ubatch-size", 512) or batch, batch), 1),
        key_type=str(flags.get("cache-type-k", "f16")),
        value_type=str(flags.get("cache-type-v", "f16")),
        full_windows=flags.get("swa-full") is True,
    )


def _compute(known: Hyperparameters, kept: Caches, ubatch: int, logits: int, *, is_flash: bool) -> tuple[int, int]:
    """The scratch memory of one batch, and what of it is in RAM where the layers are on GPUs.

    The graph's allocator reuses memory, so that the largest of its phases counts. How many rows each phase has alive at
    once was read off the buffer sizes llama.cpp logs, and is exact for plain transformers; the mask of what each token
    may look at is alive throughout."""
    row = 4 * ubatch  # one 32-bit float for each token
    width, heads, kv_heads = known.width, known.heads, known.number("attention.head_count_kv", known.heads)
    key = known.number("attention.key_length", known.head_width)
    value = known.number("attention.value_length", known.head_width)
    mask = ubatch * sum(kept.cells) * (2 if is_flash else 4)
    feed_forward = row * (5 * width + 3 * _active_ffn(known))
    if known.is_mla:  # each head's query against the compressed row, and its result
        attention = row * (6 * width + heads * (key + known.number("attention.kv_lora_rank", value)))
    else:
        attention = row * (5 * width + heads * key + 2 * kv_heads * value)
    if not is_flash and kept.cells:
        attention += row * heads * max(kept.cells)
    state = row * 5 * (width + known.number("ssm.inner_size"))
    output = 4 * logits + row * 5 * width
    return mask + max(feed_forward, attention, state, output), mask + row * 2 * width


def _active_ffn(known: Hyperparameters) -> int:
    """The widest feed-forward a token goes through."""
    dense = known.number("feed_forward_length")
    if not known.number("expert_count"):
        return dense
    expert = known.number("expert_feed_forward_length") or dense
    active = known.number("expert_used_count") * expert + known.number("expert_shared_feed_forward_length")
    return max(active, dense if known.number("leading_dense_block_count") else 0)


def _repacked(weights: Weights, flags: Mapping[str, FlagValue]) -> int:
    is_mapped = not flags.get("no-mmap") and flags.get("load-mode") not in ("none", "dio")
    if flags.get("no-repack") or not is_mapped:  # read instead of mapped, a matrix is repacked where it lies
        return 0
    return sum(weights.by_type.get(kind, 0) for kind in _REPACKED)


def _projector(details: ModelDetails) -> int:
    """Weights, and the memory of the largest picture: without flash attention every patch is held against every one."""
    known = _Clip(details)
    patches = (known.number("image_size") // max(known.number("patch_size"), 1)) ** 2
    heads = known.number("attention.head_count")
    rows = 5 * known.number("embedding_length") + 3 * known.number("feed_forward_length")
    return details.weights.total + 4 * patches * (rows + heads * patches)


class _Clip:
    def __init__(self, details: ModelDetails) -> None:
        self._metadata = details.metadata or {}

    def number(self, key: str) -> int:
        value = self._metadata.get(f"clip.vision.{key}")
        return min(value, 65_536) if isinstance(value, int) and value > 0 else 0


def _prompt_cache(flags: Mapping[str, FlagValue]) -> int:
    limit = _number(flags, "cache-ram", _PROMPT_CACHE_MIB)
    return 0 if flags.get("no-cache-prompt") else limit * MIB


def _wishes(model: Model, flags: Mapping[str, FlagValue]) -> Wishes:
    names = flags.get("device")
    split = flags.get("split-mode")
    layers = flags.get("n-gpu-layers", "auto")
    return Wishes(
        gpu_layers=_layers(layers),
        tensor_split=_split(flags.get("tensor-split")),
        devices=None if names is None else tuple(n for n in str(names).split(",") if n and n != "none"),
        main_gpu=_number(flags, "main-gpu", 0) if split == "none" else None,
        split_mode=str(split or "layer"),
        visible=model.settings.env.get("CUDA_VISIBLE_DEVICES"),
    )


def _number(flags: Mapping[str, FlagValue], name: str, default: int) -> int:
    """A flag's whole number from 0; what is none is the engine's to complain about."""
    value = flags.get(name, default)
    if isinstance(value, list):
        value = value[-1] if value else default
    if isinstance(value, bool):
        return default
    try:
        number = int(value)
    except (ValueError, OverflowError):
        return default
    return number if number >= 0 else default


def _layers(value: FlagValue) -> int | None:
    if value == "all":
        return ALL_LAYERS
    try:
        number = int(str(value))
    except ValueError:
        return None  # "auto"
    return number if number >= 0 else None


def _split(value: FlagValue | None) -> tuple[float, ...]:
    if value is None:
        return ()
    parts = value if isinstance(value, list) else re.split("[,/]", str(value))
    try:
        shares = tuple(float(part) for part in parts)
    except ValueError:
        shares = ()
    if not sum(shares) > 0 or any(not 0 <= share < math.inf for share in shares):
        raise UnsupportedError(
            f"tensor-split wants a share for each GPU, such as \"3,1\", not '{value}'", hint="mend the flag"
        )
    return shares
