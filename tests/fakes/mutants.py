"""What chance makes of a GGUF file."""

from __future__ import annotations

import random
import struct

INTERESTING = [0, 1, 7, 8, 9, 0x7F, 0xFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1]


def mutate(data: bytes, chance: random.Random) -> bytes:
    """A few of: an integer overwritten, a byte flipped, a piece cut out, doubled or cut off; mostly in the header."""
    mutant = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 3, 8))):
        limit = max(len(mutant), 9) if chance.random() < 0.1 else min(max(len(mutant), 9), 1500)
        at = chance.randrange(limit - 8)
        match chance.randrange(6):
            case 0 | 1:
                mutant[at : at + 8] = struct.pack("<Q", chance.choice(INTERESTING))
            case 2:
                mutant[at : at + 4] = struct.pack("<I", chance.choice(INTERESTING) & 0xFFFFFFFF)
            case 3:
                mutant[at : at + 1] = bytes([chance.randrange(256)])
            case 4:
                length = chance.randrange(1, 64)
                mutant[at:at] = mutant[at : at + length] if chance.random() < 0.5 else b""
                del mutant[at : at + chance.randrange(1, 64)]
            case _:
                del mutant[chance.randrange(len(mutant) + 1) :]
    return bytes(mutant)
