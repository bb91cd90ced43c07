"""What a scripted engine holds of the GPUs of `fake_nvml.c`: a file for each engine in the folder that the state names.
The library counts that as used, and gives it back after the engine's end."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def hold(size: int, tensor_split: str) -> int | None:
    """Take `size` bytes of the GPUs that this process may see. Returns what was wanted of the first that has not so
    much left; nothing is taken then. Without such GPUs there is nothing to take."""
    if not size:
        return None
    state = Path(os.environ.get("FAKE_NVML_STATE", os.devnull)).read_text()
    lines = [line.split() for line in state.splitlines()]
    folder = next((Path(" ".join(words[1:])) for words in lines if words[:1] == ["holds"]), None)
    gpus = {words[9]: words for words in lines if words[:1] == ["gpu"]}  # by UUID
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(gpus)).split(",") if name in gpus]
    if folder is None or not visible:
        return None
    shares = [float(share) for share in tensor_split.split(",")] if tensor_split else [1.0]
    wanted = {int(gpus[name][1]): int(size * share / sum(shares)) for name, share in zip(visible, shares, strict=False)}
    held = dict.fromkeys(wanted, 0)
    for file in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # just given back
            for line in file.read_text().splitlines():
                index, taken = map(int, line.split())
                held[index] = held.get(index, 0) + taken
    for words in gpus.values():
        index, total, used = int(words[1]), int(words[3]), int(words[4])
        if wanted.get(index, 0) > total - used - held.get(index, 0):
            return wanted[index]
    (folder / str(os.getpid())).write_text("".join(f"{index} {taken}\n" for index, taken in wanted.items()))
    return None
