"""How fast do quantized blocks become weights?

`gemstill.ops.blocks.dequantize` against `gguf.quants.dequantize` (numpy) on the same blocks, to float32,
as many as the query projection of Gemma 2 2B has; memory for the result is new each time, as each of them takes it.
"""

from __future__ import annotations

from importlib.metadata import version

import gguf
import numpy as np
import torch

from common import alternate, arguments, compare, finish, seconds
from gemstill.ops.blocks import BLOCKS, dequantize, quantize

WIDTH, ROWS = 2304, 2048
SCALES = {"Q8_0": [0], "Q4_0": [0], "Q5_0": [0], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "F16": [], "BF16": []}
BAR = 3.0  # not for F16 and BF16, where both only copy


def blocks(name: str, rows: int) -> np.ndarray:
    """Random blocks [rows, bytes] uint8 of rows of WIDTH weights, with finite scales."""
    rng = np.random.default_rng(0)
    block = BLOCKS[name]
    if not SCALES[name]:
        return quantize(torch.randn(rows, WIDTH), name).numpy()
    data = rng.integers(0, 256, (rows * WIDTH // block.size, block.bytes), dtype=np.uint8)
    for at in SCALES[name]:
        data[:, at : at + 2] = rng.standard_normal((len(data), 1)).astype(np.float16).view(np.uint8)
    return data.reshape(rows, -1)


def main() -> None:
    args = arguments(__doc__, rounds=5)
    rows = []
    for name in SCALES:
        data = blocks(name, ROWS)
        tensor, kind = torch.from_numpy(data), getattr(gguf.GGMLQuantizationType, name)
        amount = ROWS * WIDTH / 1e6

        def ours(tensor: torch.Tensor = tensor, name: str = name, amount: float = amount) -> float:
            return amount / seconds(lambda: dequantize(tensor, name))

        def peer(data: np.ndarray = data, kind: int = kind, amount: float = amount) -> float:
            return amount / seconds(lambda: gguf.quants.dequantize(data, kind))

        found = alternate({"ours": ours, "peer": peer}, rounds=2 * args.rounds if args.full else args.rounds)
        bar = None if name in ("F16", "BF16") else BAR
        rows.append(compare(f"{name} to float32", found["ours"], found["peer"], "M weights/s", bar=bar))
    finish(rows, peer=f"gguf {version('gguf')}, numpy {np.__version__}", threads=torch.get_num_threads())


if __name__ == "__main__":
    main()
