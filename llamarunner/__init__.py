"""LlamaRunner: a terminal control center for a GPU box that serves local language models."""

from __future__ import annotations

__version__ = "0.1.0"
