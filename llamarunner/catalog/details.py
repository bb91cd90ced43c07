"""What a GGUF header means: the `ModelDetails` that APIs and panes show, and what the model can do."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from llamarunner.catalog.catalog import Capability, ModelDetails, Weights
from llamarunner.catalog.gguf import Header, printable, read_header

# llama.cpp's names of general.file_type
_FILE_TYPES = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    7: "Q8_0",
    8: "Q5_0",
    9: "Q5_1",
    10: "Q2_K",
    11: "Q3_K_S",
    12: "Q3_K_M",
    13: "Q3_K_L",
    14: "Q4_K_S",
    15: "Q4_K_M",
    16: "Q5_K_S",
    17: "Q5_K_M",
    18: "Q6_K",
    19: "IQ2_XXS",
    20: "IQ2_XS",
    21: "Q2_K_S",
    22: "IQ3_XS",
    23: "IQ3_XXS",
    24: "IQ1_S",
    25: "IQ4_NL",
    26: "IQ3_S",
    27: "IQ3_M",
    28: "IQ2_S",
    29: "IQ2_M",
    30: "IQ4_XS",
    31: "IQ1_M",
    32: "BF16",
    36: "TQ1_0",
    37: "TQ2_0",
    38: "MXFP4",
    39: "NVFP4",
    40: "Q1_0",
    41: "Q2_0",
}
_FILE_TYPE_GUESSED = 1024
MAX_BLOCKS = 1000  # a damaged header may claim four billion


def read_details(path: Path) -> ModelDetails:
    """Raises ModelFileError as `read_header` does."""
    return details_of(read_header(path))


def details_of(*headers: Header) -> ModelDetails:
    """What APIs and panes show of a model; the headers of all parts where it is split, the first part's first."""
    first = headers[0]
    architecture = first.architecture
    parameters: Counter[str] = Counter()
    for header in headers:
        parameters.update(header.parameters)
    count = sum(parameters.values())
    return ModelDetails(
        architecture=printable(architecture, 64),
        parameter_count=count,
        parameter_size=format_parameters(count),
        quantization=_quantization(first, parameters),
        context_length=first.number(f"{architecture}.context_length"),
        embedding_length=first.number(f"{architecture}.embedding_length"),
        block_count=first.number(f"{architecture}.block_count"),
        chat_template=first.text("tokenizer.chat_template"),
        basename=printable(first.text("general.basename"), 128),
        capabilities=_capabilities(first),
        metadata=first.metadata,
        weights=_weights(headers, first.number(f"{architecture}.block_count")),
        vocabulary=first.lengths.get("tokenizer.ggml.tokens", 0) or first.number(f"{architecture}.vocab_size"),
        merges=first.lengths.get("tokenizer.ggml.merges", 0),
    )


def _weights(headers: Sequence[Header], blocks: int) -> Weights:
    """Blocks past `block_count`, which llama.cpp does not load, count as other."""
    groups: Counter[str] = Counter()
    types: Counter[str] = Counter()
    for header in headers:
        for (group, kind), size in header.tensor_bytes.items():
            groups[group] += size
            if group != "token_embd":
                types[kind] += size
    blocks = min(blocks, MAX_BLOCKS)
    layers = tuple(groups.pop(f"blk.{number}", 0) for number in range(blocks))
    experts = tuple(groups.pop(f"blk.{number} experts", 0) for number in range(blocks))
    embedding, output = groups.pop("token_embd", 0), groups.pop("output", 0)
    return Weights(layers, experts, embedding, output, sum(groups.values()), dict(types))


def _quantization(header: Header, parameters: Counter[str]) -> str:
    if "general.file_type" in header.metadata:
        name = _FILE_TYPES.get(header.number("general.file_type") & ~_FILE_TYPE_GUESSED)
        if name:
            return name
    return parameters.most_common(1)[0][0] if parameters else ""


_ENCODERS = re.compile(r"bert|t5encoder|embed")


def _capabilities(header: Header) -> frozenset[Capability]:
    keys, architecture = header.metadata, header.architecture
    if header.is_projector:
        encoders = ((Capability.VISION, "clip.has_vision_encoder"), (Capability.AUDIO, "clip.has_audio_encoder"))
        return frozenset(capability for capability, key in encoders if keys.get(key))
    if f"{architecture}.pooling_type" in keys or _ENCODERS.search(architecture):
        return frozenset({Capability.EMBEDDING})
    found = {Capability.COMPLETION}
    template = header.text("tokenizer.chat_template")
    if re.search(r"\btools\b|tool_call", template) or "tokenizer.chat_template.tool_use" in keys:
        found.add(Capability.TOOLS)
    if ("<think>" in template and "</think>" in template) or "enable_thinking" in template or architecture == "gpt-oss":
        found.add(Capability.THINKING)
    if f"{architecture}.vision.block_count" in keys:
        found.add(Capability.VISION)
    if f"{architecture}.audio.block_count" in keys:
        found.add(Capability.AUDIO)
    if any(f"tokenizer.ggml.{name}_token_id" in keys for name in ("fim_pre", "prefix")):
        found.add(Capability.INSERT)
    return frozenset(found)


def format_parameters(count: int) -> str:
    """ "8.2B", "135M", "4.4M", "12K"; "" for none."""
    if not count:
        return ""
    if count >= 999_500_000:
        return f"{count / 1e9:.1f}B"
    if count >= 9_950_000:
        return f"{count / 1e6:.0f}M"
    return f"{count / 1e6:.1f}M" if count >= 950_000 else f"{max(count / 1e3, 1):.0f}K"
