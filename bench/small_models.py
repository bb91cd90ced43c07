"""Small GGUF models of many architectures with random weights: they say nonsense, and need memory like real ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np


@dataclass(frozen=True)
class Shape:
    """The sizes that decide memory; what an architecture has besides is in its recipe."""

    width: int = 512
    layers: int = 8
    ffn: int = 1536
    heads: int = 8
    kv_heads: int | Sequence[int] = 4
    head: int = 64
    vocabulary: int = 16_384
    context: int = 8192
    window: int = 512
    weights: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F16


@dataclass
class Draft:
    """One file in the making."""

    shape: Shape
    writer: gguf.GGUFWriter
    random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(7))

    def matrix(self, name: str, *dimensions: int) -> None:
        """Weights of `dimensions` in llama.cpp's order: the first is the length of a row."""
        data = self.random.standard_normal(tuple(reversed(dimensions)), dtype=np.float32) * np.float32(0.02)
        kind = self.shape.weights
        if kind is gguf.GGMLQuantizationType.F16:
            self.writer.add_tensor(f"{name}.weight", data.astype(np.float16))
        else:
            self.writer.add_tensor(f"{name}.weight", _quantized(data, kind), raw_dtype=kind)

    def vector(self, name: str, *dimensions: int, value: float = 1.0) -> None:
        full = name if name.endswith((".bias", "ssm_a")) else f"{name}.weight"
        self.writer.add_tensor(full, np.full(tuple(reversed(dimensions)), value, dtype=np.float32))

    def attention(self, block: str, kv_heads: int) -> None:
        shape = self.shape
        self.matrix(f"{block}.attn_q", shape.width, shape.heads * shape.head)
        self.matrix(f"{block}.attn_k", shape.width, kv_heads * shape.head)
        self.matrix(f"{block}.attn_v", shape.width, kv_heads * shape.head)
        self.matrix(f"{block}.attn_output", shape.heads * shape.head, shape.width)

    def feed_forward(self, block: str) -> None:
        for part in ("ffn_gate", "ffn_up"):
            self.matrix(f"{block}.{part}", self.shape.width, self.shape.ffn)
        self.matrix(f"{block}.ffn_down", self.shape.ffn, self.shape.width)

    def experts(self, block: str, count: int, ffn: int) -> None:
        width = self.shape.width
        self.vector(f"{block}.ffn_gate_inp", width, count, value=0.01)
        for part in ("ffn_gate_exps", "ffn_up_exps"):
            self.matrix(f"{block}.{part}", width, ffn, count)
        self.matrix(f"{block}.ffn_down_exps", ffn, width, count)


def _quantized(data: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """Zeros of the right length where the package reads a type and cannot write it."""
    try:
        return gguf.quants.quantize(data, kind)
    except NotImplementedError:
        return np.zeros(gguf.quants.quant_shape_to_byte_shape(data.shape, kind), dtype=np.uint8)


def write(path: Path, architecture: str, shape: Shape | None = None) -> Path:
    shape = shape or Shape()
    writer = gguf.GGUFWriter(path, architecture)
    draft = Draft(shape, writer)
    _common(writer, shape)
    _tokenizer(writer, shape.vocabulary)
    draft.matrix("token_embd", shape.width, shape.vocabulary)
    RECIPES[architecture](draft)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _common(writer: gguf.GGUFWriter, shape: Shape) -> None:
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads if isinstance(shape.kv_heads, int) else list(shape.kv_heads))
    writer.add_key_length(shape.head)
    writer.add_value_length(shape.head)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape.vocabulary)


def _tokenizer(writer: gguf.GGUFWriter, size: int) -> None:
    """Of the SentencePiece kind, which needs no merges: three control tokens, every byte, and made-up words."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = (f"\u2581w{number:x}" for number in range(size))
    tokens += [next(words) for _ in range(size - len(tokens))]
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    kinds += [gguf.TokenType.BYTE] * 256
    kinds += [gguf.TokenType.NORMAL] * (size - len(kinds))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(number) for number in range(size)])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _blocks(draft: Draft) -> list[tuple[str, int]]:
    """Each block's name and its key/value heads."""
    heads, layers = draft.shape.kv_heads, draft.shape.layers
    return [(f"blk.{n}", heads if isinstance(heads, int) else heads[n]) for n in range(layers)]


def _output(draft: Draft, *, tied: bool = False) -> None:
    draft.vector("output_norm", draft.shape.width)
    if not tied:
        draft.matrix("output", draft.shape.width, draft.shape.vocabulary)


def _norms(draft: Draft, block: str, *names: str) -> None:
    for name in names:
        draft.vector(f"{block}.{name}", draft.shape.width)


def _llama(draft: Draft) -> None:
    draft.writer.add_rope_dimension_count(draft.shape.head)
    _output(draft)
    for block, kv_heads in _blocks(draft):
        _norms(draft, block, "attn_norm", "ffn_norm")
        draft.attention(block, kv_heads)
        draft.feed_forward(block)


def _qwen2(draft: Draft) -> None:
    shape = draft.shape
    _llama(draft)
    for block, kv_heads in _blocks(draft):
        draft.vector(f"{block}.attn_q.bias", shape.heads * shape.head, value=0.0)
        draft.vector(f"{block}.attn_k.bias", kv_heads * shape.head, value=0.0)
        draft.vector(f"{block}.attn_v.bias", kv_heads * shape.head, value=0.0)


def _head_norms(draft: Draft, block: str) -> None:
    draft.vector(f"{block}.attn_q_norm", draft.shape.head)
    draft.vector(f"{block}.attn_k_norm", draft.shape.head)


def _qwen3(draft: Draft) -> None:
    _llama(draft)
    for block, _ in _blocks(draft):
        _head_norms(draft, block)


def _qwen3moe(draft: Draft) -> None:
    draft.writer.add_expert_count(8)
    draft.writer.add_expert_used_count(2)
    draft.writer.add_expert_feed_forward_length(512)
    _output(draft)
    for block, kv_heads in _blocks(draft):
        _norms(draft, block, "attn_norm", "ffn_norm")
        draft.attention(block, kv_heads)
        _head_norms(draft, block)
        draft.experts(block, 8, 512)


def _gemma2(draft: Draft) -> None:
    draft.writer.add_sliding_window(draft.shape.window)
    draft.writer.add_attn_logit_softcapping(50.0)
    draft.writer.add_final_logit_softcapping(30.0)
    _gemma_blocks(draft)


def _gemma3(draft: Draft) -> None:
    draft.writer.add_sliding_window(draft.shape.window)
    _gemma_blocks(draft)
    for block, _ in _blocks(draft):
        _head_norms(draft, block)


def _gemma_blocks(draft: Draft) -> None:
    _output(draft, tied=True)
    for block, kv_heads in _blocks(draft):
        _norms(draft, block, "attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")
        draft.attention(block, kv_heads)
        draft.feed_forward(block)


def _phi3(draft: Draft) -> None:
    shape = draft.shape
    draft.writer.add_rope_dimension_count(shape.head)
    draft.writer.add_rope_scaling_orig_ctx_len(shape.context)
    _output(draft)
    for block, kv_heads in _blocks(draft):
        _norms(draft, block, "attn_norm", "ffn_norm")
        draft.matrix(f"{block}.attn_qkv", shape.width, (shape.heads + 2 * kv_heads) * shape.head)
        draft.matrix(f"{block}.attn_output", shape.heads * shape.head, shape.width)
        draft.matrix(f"{block}.ffn_up", shape.width, 2 * shape.ffn)
        draft.matrix(f"{block}.ffn_down", shape.ffn, shape.width)


def _mamba(draft: Draft) -> None:
    width, inner, state, kernel, rank = draft.shape.width, draft.shape.width * 2, 16, 4, draft.shape.width // 16
    draft.writer.add_ssm_conv_kernel(kernel)
    draft.writer.add_ssm_inner_size(inner)
    draft.writer.add_ssm_state_size(state)
    draft.writer.add_ssm_time_step_rank(rank)
    _output(draft)
    for block, _ in _blocks(draft):
        _norms(draft, block, "attn_norm")
        draft.matrix(f"{block}.ssm_in", width, 2 * inner)
        draft.vector(f"{block}.ssm_conv1d", kernel, inner, value=0.1)
        draft.vector(f"{block}.ssm_conv1d.bias", inner, value=0.0)
        draft.matrix(f"{block}.ssm_x", inner, rank + 2 * state)
        draft.matrix(f"{block}.ssm_dt", rank, inner)
        draft.vector(f"{block}.ssm_dt.bias", inner, value=0.0)
        draft.vector(f"{block}.ssm_a", state, inner, value=-1.0)
        draft.writer.add_tensor(f"{block}.ssm_d", np.ones(inner, dtype=np.float32))
        draft.matrix(f"{block}.ssm_out", inner, width)


def _lfm2(draft: Draft) -> None:
    """Hybrid: blocks without key/value heads keep a short convolution's state instead."""
    width, kernel = draft.shape.width, 3
    draft.writer.add_shortconv_l_cache(kernel)
    draft.vector("token_embd_norm", width)
    for block, kv_heads in _blocks(draft):
        _norms(draft, block, "attn_norm", "ffn_norm")
        draft.feed_forward(block)
        if kv_heads:
            draft.attention(block, kv_heads)
            _head_norms(draft, block)
        else:
            draft.vector(f"{block}.shortconv.conv", kernel, width, value=0.1)
            draft.matrix(f"{block}.shortconv.in_proj", width, 3 * width)
            draft.matrix(f"{block}.shortconv.out_proj", width, width)


def _gpt_oss(draft: Draft) -> None:
    shape, experts, ffn = draft.shape, 8, 512
    draft.writer.add_sliding_window(shape.window)
    draft.writer.add_expert_count(experts)
    draft.writer.add_expert_used_count(2)
    draft.writer.add_expert_feed_forward_length(ffn)
    _output(draft)
    for block, kv_heads in _blocks(draft):
        _norms(draft, block, "attn_norm", "post_attention_norm")
        draft.attention(block, kv_heads)
        queries, keys = shape.heads * shape.head, kv_heads * shape.head
        for name, length in (("q", queries), ("k", keys), ("v", keys), ("output", shape.width)):
            draft.vector(f"{block}.attn_{name}.bias", length, value=0.0)
        draft.vector(f"{block}.attn_sinks", shape.heads, value=0.0)
        draft.experts(block, experts, ffn)
        draft.vector(f"{block}.ffn_gate_inp.bias", experts, value=0.0)
        for name, length in (("gate", ffn), ("up", ffn), ("down", shape.width)):
            draft.vector(f"{block}.ffn_{name}_exps.bias", length, experts, value=0.0)


def _deepseek2(draft: Draft) -> None:
    """Multi-head latent attention: one compressed row of keys in place of every head's keys and values."""
    shape, rank, rope, plain = draft.shape, 256, 32, 64
    writer = draft.writer
    writer.add_q_lora_rank(rank)
    writer.add_kv_lora_rank(rank)
    writer.add_key_length_mla(plain + rope)
    writer.add_value_length_mla(plain)
    writer.add_rope_dimension_count(rope)
    writer.add_leading_dense_block_count(shape.layers)
    writer.add_expert_count(8)
    writer.add_expert_used_count(2)
    writer.add_expert_shared_count(1)
    writer.add_expert_feed_forward_length(512)
    writer.add_expert_weights_scale(1.0)
    _output(draft)
    for block, _ in _blocks(draft):
        _norms(draft, block, "attn_norm", "ffn_norm")
        draft.matrix(f"{block}.attn_q_a", shape.width, rank)
        draft.vector(f"{block}.attn_q_a_norm", rank)
        draft.matrix(f"{block}.attn_q_b", rank, shape.heads * (plain + rope))
        draft.matrix(f"{block}.attn_kv_a_mqa", shape.width, rank + rope)
        draft.vector(f"{block}.attn_kv_a_norm", rank)
        draft.matrix(f"{block}.attn_k_b", plain, rank, shape.heads)
        draft.matrix(f"{block}.attn_v_b", rank, plain, shape.heads)
        draft.matrix(f"{block}.attn_output", shape.heads * plain, shape.width)
        draft.feed_forward(block)


RECIPES: dict[str, Callable[[Draft], None]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3moe": _qwen3moe,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "phi3": _phi3,
    "mamba": _mamba,
    "lfm2": _lfm2,
    "gpt-oss": _gpt_oss,
    "deepseek2": _deepseek2,
}
