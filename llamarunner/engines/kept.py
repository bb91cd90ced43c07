"""Answers of programs, kept on disk: one JSON file of answers by key, replaced whole. What is lost is asked anew."""

from __future__ import annotations

import json
import logging
import os
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from llamarunner import paths

logger = logging.getLogger(__name__)

_MAX_FILE_BYTES = 16 * 1024**2
_VERSION = 1


class KeptAnswers:
    """`get` and `put` block, and may be called in any thread. The oldest answers beyond `most` are forgotten."""

    def __init__(self, path: Path, most: int) -> None:
        self._path = path
        self._most = most
        self._lock = threading.Lock()

    def get(self, key: str) -> Any:
        """None where there is no answer, or none that can be read."""
        with self._lock:
            return self._load().get(key)

    def put(self, key: str, answer: Any) -> None:
        with self._lock:
            answers = self._load()
            answers.pop(key, None)
            answers[key] = answer
            try:
                self._save(dict(list(answers.items())[-self._most :]))
            except OSError as error:
                logger.warning("%s is not kept: %s", self._path, error)

    def _load(self) -> dict[str, Any]:
        try:
            with self._path.open("rb") as file:
                whole = json.loads(file.read(_MAX_FILE_BYTES))
            return dict(whole["answers"]) if whole["version"] == _VERSION else {}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            logger.debug("%s cannot be read, and is made anew: %r", self._path, error)
            return {}

    def _save(self, answers: dict[str, Any]) -> None:
        paths.make_private(self._path.parent)
        descriptor, temporary = tempfile.mkstemp(dir=self._path.parent, prefix=f".{self._path.name}.")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8", errors="surrogateescape") as file:
                json.dump({"version": _VERSION, "answers": answers}, file, separators=(",", ":"))
            os.replace(temporary, self._path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
