"""A million damaged GGUF files: `python -m bench.fuzz_headers` reads each as discovery does.

Whatever happens but a result or a clear refusal is told with the seed that repeats it, and the input is kept. Takes
about ten minutes; --inputs and --seed make it shorter or another one.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from llamarunner.catalog.gguf import MAX_HEADER_BYTES, read_both
from llamarunner.catalog.headers import know
from llamarunner.errors import ModelFileError
from tests.fakes.gguf_file import whole_files
from tests.fakes.mutants import mutate

SLOW_S = 0.1
_SPARSE = (2**20, MAX_HEADER_BYTES + 4096, 2**41)  # a file that only claims to be so large


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, default=Path(tempfile.gettempdir()) / "llamarunner-fuzz")
    options = parser.parse_args()
    originals, outcomes = whole_files(), Counter[str]()
    slowest, slowest_seed, memory = 0.0, 0, _peak()
    with tempfile.TemporaryDirectory(prefix="llamarunner-fuzz-", dir=_quick_folder()) as folder:
        path = Path(folder) / "mutant.gguf"
        for number in range(options.inputs):
            seed = options.seed * 10**9 + number
            data = _write(path, originals, seed)
            started = time.perf_counter()
            outcome = _read(path)
            took = time.perf_counter() - started
            if took > SLOW_S:  # under load the machine may have been busy: the second time counts
                started = time.perf_counter()
                _read(path)
                took = min(took, time.perf_counter() - started)
            if took > slowest:
                slowest, slowest_seed = took, seed
            outcomes[outcome] += 1
            if outcome not in ("read", "refused") or took > SLOW_S:
                options.keep.mkdir(parents=True, exist_ok=True)
                (options.keep / f"{seed}.gguf").write_bytes(data)
                print(f"seed {seed}: {outcome} in {took:.3f} s, kept in {options.keep}", flush=True)
            if number % 100_000 == 0:
                print(f"{number:,} ...", file=sys.stderr, flush=True)
    print(f"{options.inputs:,} inputs: {dict(outcomes)}")
    print(
        f"slowest: {1000 * slowest:.1f} ms (seed {slowest_seed}); memory grew by {(_peak() - memory) / 2**20:.1f} MiB"
    )
    return 1 if set(outcomes) - {"read", "refused"} or slowest > SLOW_S else 0


def _write(path: Path, originals: list[bytes], seed: int) -> bytes:
    chance = random.Random(seed)
    data = mutate(chance.choice(originals), chance)
    path.write_bytes(data)
    if chance.random() < 0.2:
        os.truncate(path, max(len(data), chance.choice(_SPARSE)))
    return data


def _read(path: Path) -> str:
    try:
        known = know(*read_both(path))
        if known.header.metadata.keys() != known.details.metadata.keys():  # type: ignore[union-attr]  # know sets it
            return "keys were lost"
    except ModelFileError:
        return "refused"
    except Exception as error:  # noqa: BLE001 this is what is looked for
        return f"{type(error).__name__}: {error}"
    return "read"


def _quick_folder() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    sys.exit(main())
