"""What each block of a model remembers of a conversation: keys and values of every token, or of a window of the last
ones, or a state of fixed size. Pure; after llama.cpp's llama-kv-cache, llama-kv-cache-iswa, llama-memory-recurrent and
llama-hparams. The side caches of sparse attention (DeepSeek's indexer) are not counted."""

from __future__ import annotations

import re
from dataclasses import dataclass

from llamarunner.catalog.catalog import ModelDetails

# Bytes of 256 values: the cache's types by their flag names
TYPE_BYTES = {
    "f32": 1024,
    "f16": 512,
    "bf16": 512,
    "q8_0": 272,
    "q5_1": 192,
    "q5_0": 176,
    "q4_1": 160,
    "q4_0": 144,
    "iq4_nl": 144,
}
_PAD = 256  # llama.cpp rounds the cells of every cache up to it

# Architectures whose window's pattern is in llama.cpp and not in the file, or only its period is: (period, whether the
# block without a window is the first of each period, else it is the last). The file's own pattern goes before it.
_PATTERNS = {
    "afmoe": (4, False),
    "cohere2": (4, False),
    "exaone-moe": (4, False),
    "exaone4": (4, False),
    "gemma2": (2, False),
    "gemma3": (6, False),
    "gemma3n": (5, False),
    "gpt-oss": (2, False),
    "laguna": (4, True),
    "llama4": (4, False),
    "olmo2": (4, False),
    "phi3": (1, False),  # has a window in its file, and llama.cpp does without
    "plamo3": (8, False),
    "smallthinker": (4, True),
}
_DENSE_FIRST = {"cohere2moe", *(name for name, (_, dense_first) in _PATTERNS.items() if dense_first)}
_LLAMA4_WINDOW = 8192
_GEMMA3N_CACHED_BLOCKS = 20

_STATE_ONLY = re.compile(r"mamba2?|a?rwkv\d\w*")
_STRIDED = re.compile(r"qwen3next|qwen35(moe)?")  # full attention in every n-th block, a state in the others
_BOTH = "falcon-h1"  # keys, values and a state in every block
# these look at a whole input at once and remember nothing
_FORGETFUL = re.compile(r".*bert.*|t5encoder|gemma-embedding|dream|llada(-moe)?")


@dataclass(frozen=True, slots=True)
class CacheSettings:
    context: int  # tokens over all slots (ctx-size)
    slots: int
    unified: bool = False  # one cache for all slots
    ubatch: int = 512
    key_type: str = "f16"
    value_type: str = "f16"
    full_windows: bool = False  # swa-full


@dataclass(frozen=True, slots=True)
class Caches:
    layers: tuple[int, ...]  # bytes of each block
    cells: tuple[int, ...]  # how far a token can look back: in blocks without a window, and in those with one
    rewindable: bool  # False where a conversation can only be taken back through a snapshot
    snapshot: int  # bytes of one slot's snapshot of what cannot be taken back


class Hyperparameters:
    """A header's numbers, of which nothing is believed: what is not a whole number from 0 might as well be missing."""

    def __init__(self, details: ModelDetails) -> None:
        self.architecture = details.architecture
        self.blocks = len(details.weights.layers)
        self._metadata = details.metadata or {}

    def number(self, key: str, default: int = 0) -> int:
        """The largest, where the file has one for each block."""
        return max(self.each(key, default), default=default)

    def each(self, key: str, default: int = 0) -> tuple[int, ...]:
        value = self._metadata.get(f"{self.architecture}.{key}")
        values = value if isinstance(value, list) else [value] * max(self.blocks, 1)
        numbers = tuple(int(v) if isinstance(v, int) and v >= 0 else default for v in values)
        return (numbers + (default,) * self.blocks)[: max(self.blocks, 1)]

    def has(self, key: str) -> bool:
        return f"{self.architecture}.{key}" in self._metadata

    @property
    def is_causal(self) -> bool:
        return self._metadata.get(f"{self.architecture}.attention.causal") is not False

    @property
    def heads(self) -> int:
        return self.number("attention.head_count")

    @property
    def width(self) -> int:
        return self.number("embedding_length")

    @property
    def head_width(self) -> int:
        return self.width // self.heads if self.heads else 0

    @property
    def is_mla(self) -> bool:
        """Multi-head latent attention: a token has one compressed row in place of every head's key and value."""
        return self.number("attention.key_length_mla") > 0


def caches(details: ModelDetails, settings: CacheSettings) -> Caches:
    known = Hyperparameters(details)
    forgetful = _FORGETFUL.fullmatch(known.architecture) or not known.is_causal
    if not known.blocks or forgetful:
        return Caches((0,) * known.blocks, (settings.ubatch,), True, 0)
    streams = 1 if settings.unified else settings.slots
    whole = _padded(settings.context)
    far = whole if settings.unified else _padded(whole // max(settings.slots, 1))
    window = known.number("attention.sliding_window") or (_LLAMA4_WINDOW if known.architecture == "llama4" else 0)
    near = _padded(min(far, window * (settings.slots if settings.unified else 1) + settings.ubatch))
    windowed, remembers, states = _windowed(known, window), _remembers(known), _states(known)
    keeps_state, rows = state_bytes(known), _rows(known, settings, windowed)
    layers, snapshot = [], 0
    for block in range(known.blocks):
        kept = settings.slots * keeps_state if states[block] else 0
        snapshot += keeps_state if states[block] else 0
        if remembers[block]:
            short = windowed[block] and not settings.full_windows
            kept += rows[block] * (near if short else far) * streams
            snapshot += rows[block] * min(near, window + settings.ubatch) if short else 0
        layers.append(kept)
    cells = [far]
    if any(windowed):
        cells.append(far if settings.full_windows else near)
    return Caches(tuple(layers), tuple(cells) if any(remembers) else (), snapshot == 0, snapshot)


def _padded(cells: int) -> int:
    return -(-cells // _PAD) * _PAD


def _rows(known: Hyperparameters, settings: CacheSettings, windowed: tuple[bool, ...]) -> tuple[int, ...]:
    """Key and value of one token in each block."""
    heads = known.each("attention.head_count_kv", known.heads)
    parts = []
    for part, kind in (("key", settings.key_type), ("value", settings.value_type)):
        wide = known.each(f"attention.{part}_length", known.head_width)
        short = known.each(f"attention.{part}_length_swa", -1)
        lengths = [s if is_short and s >= 0 else w for w, s, is_short in zip(wide, short, windowed, strict=True)]
        if known.is_mla and part == "value":  # it is made from the key's row
            lengths = [0] * len(lengths)
        parts.append([h * length * TYPE_BYTES.get(kind, 512) for h, length in zip(heads, lengths, strict=True)])
    return tuple((key + value) // 256 for key, value in zip(*parts, strict=True))


def _windowed(known: Hyperparameters, window: int) -> tuple[bool, ...]:
    if not window:
        return (False,) * known.blocks
    period, _ = _PATTERNS.get(known.architecture, (1, False))
    pattern = known.each("attention.sliding_window_pattern", period)
    if known.has("attention.sliding_window_pattern") and set(pattern) <= {0, 1}:
        return tuple(bool(flag) for flag in pattern)  # one flag a block
    period = max(pattern[0], 1)
    dense = 0 if known.architecture in _DENSE_FIRST else period - 1
    return tuple(block % period != dense for block in range(known.blocks))


def _remembers(known: Hyperparameters) -> tuple[bool, ...]:
    """Which blocks have keys and values of their own."""
    if _STATE_ONLY.fullmatch(known.architecture):
        return (False,) * known.blocks
    if _STRIDED.fullmatch(known.architecture):
        return tuple(not state for state in _states(known))
    shared = known.number("attention.shared_kv_layers")  # the last blocks use those of earlier ones
    cached = known.blocks - shared - known.number("nextn_predict_layers")  # the latter guess ahead, if asked to
    if known.architecture == "gemma3n":
        cached = _GEMMA3N_CACHED_BLOCKS
    heads = known.each("attention.head_count_kv", known.heads)
    return tuple(block < cached and heads[block] > 0 for block in range(known.blocks))


def _states(known: Hyperparameters) -> tuple[bool, ...]:
    """Which blocks have a state of fixed size."""
    if not state_bytes(known):
        return (False,) * known.blocks
    if _STATE_ONLY.fullmatch(known.architecture) or known.architecture == _BOTH:
        return (True,) * known.blocks
    if _STRIDED.fullmatch(known.architecture):
        stride = max(known.number("full_attention_interval", 4), 1)
        return tuple((block + 1) % stride != 0 for block in range(known.blocks))
    return tuple(heads == 0 for heads in known.each("attention.head_count_kv", known.heads))


def state_bytes(known: Hyperparameters) -> int:
    """The state of one block for one slot: 32-bit floats of a convolution's past and of what it sums up to."""
    width = known.width
    if head := known.number("wkv.head_size"):
        return 4 * width * (known.number("token_shift_count", 2) + head)
    if past := known.number("shortconv.l_cache"):
        return 4 * width * (past - 1)
    inner, state = known.number("ssm.inner_size"), known.number("ssm.state_size")
    past = max(known.number("ssm.conv_kernel") - 1, 0)
    return 4 * (past * (inner + 2 * known.number("ssm.group_count") * state) + state * inner)
