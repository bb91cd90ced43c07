"""GGUF files that llama.cpp itself cannot load: Ollama's own converter made some, and its engine translates them as it
loads. Decided by what lies in the file, as most share their architecture's name with files that llama.cpp does load.
Pure.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from llamarunner.catalog.gguf import Header, Tensor

HINT = "pull the same model from Hugging Face (hf.co/…), or put another GGUF of it into a folder"

# Names that llama.cpp has not: it calls these gpt-oss, qwen2vl, deepseek2-ocr, deepseek2, olmo2, ...
_OLLAMA_NAMES = frozenset(
    ("gptoss", "qwen25vl", "deepseekocr", "glmocr", "glm4moelite", "olmo3", "nemotron_h_omni", "mllama")
)
# First words of tensors that llama.cpp wants in a projector of their own: vision, audio, SAM, what lies between
_ELSEWHERE = frozenset(("v", "a", "s", "mm"))
_EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")


def needs_patched_engine(header: Header, tensors: Iterable[Tensor]) -> str:
    """Why only Ollama's engine can load it; "" where any llama.cpp can, or where nothing speaks against it."""
    architecture, keys = header.architecture, header.metadata
    if header.is_projector:
        # LLaVA's oldest: llama.cpp no longer guesses what kind of projector it is
        named = any(f"clip.{of}projector_type" in keys for of in ("", "vision.", "audio."))
        return "" if named else "its projector does not say of what type it is"
    if not header.is_model:
        return ""
    if architecture in _OLLAMA_NAMES:
        return f"its architecture is called {architecture}, a name that only Ollama's engine knows"
    rows: dict[str, int] = {}  # of the embeddings of tokens
    kinds = set()
    for tensor in tensors:
        kinds.add(_kind(tensor.name))
        if tensor.name in _EMBEDDINGS and len(tensor.shape) == 2:
            rows[tensor.name] = tensor.shape[1]
    if kinds & _ELSEWHERE:
        return "what sees or hears lies in the model's own file"
    if why := _otherwise_made(header, kinds, rows):
        return f"its file is made otherwise than llama.cpp's {architecture}: {why}"
    return ""


@lru_cache(maxsize=4096)
def _kind(name: str) -> str:
    """ "attn_q.weight" of "blk.7.attn_q.weight"; of a tensor outside the blocks its first word."""
    first, _, rest = name.partition(".")
    return rest.partition(".")[2] if first == "blk" else first


def _otherwise_made(header: Header, kinds: set[str], rows: dict[str, int]) -> str:
    architecture, keys = header.architecture, header.metadata
    match architecture:
        case "gemma3" if "dense" in kinds:
            return "an embedding model, which llama.cpp calls gemma-embedding"
        case "gemma3" if kinds and "gemma3.attention.layer_norm_rms_epsilon" not in keys:
            return "attention.layer_norm_rms_epsilon is missing"
        case "gemma3n" if len(set(rows.values())) > 1:
            return "its two token embeddings differ in length"
        case "lfm2" if "output_norm" in kinds and "token_embd_norm" not in kinds:
            return "token_embd_norm is missing"
        case "qwen3next" | "qwen35" | "qwen35moe" if "ssm_dt" in kinds or "mtp" in kinds:
            return "tensors have other names"
        case "qwen3vl" | "qwen3vlmoe" if f"{architecture}.rope.dimension_sections" not in keys:
            return "rope.dimension_sections is missing"
        case "nemotron_h_moe" if "mtp" in kinds or any(kind.startswith("ffn_latent_in") for kind in kinds):
            return "tensors have other names"
        case "laguna" if "attn_g.weight" in kinds:
            return "tensors have other names"
        case _:
            return ""
