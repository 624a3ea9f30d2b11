"""How near to the memory's own speed do weights come to be multiplied with a few vectors?

The products of four layers of Gemma 2 2B's shape, in turn, so that no weight is still in a cache when it is read
again: queries, keys and values; the output projection; gate and up; down. Rows: bytes of weights a second, for packed
weights in eight and four bits and for bfloat16 rows as they are stored, times 1, 2 and 8 vectors. The limit is the read
bandwidth of the machine. The peer is PyTorch's own: `_weight_int8pack_mm` (a scale for each row),
`_weight_int4pack_mm_for_cpu` (blocks of 32) and `linear`, vectors in bfloat16, which is what these take.

GEMSTILL_KERNELS=avx2 (or avx512) measures that instruction set. --accuracy MODEL.gguf measures instead what it costs
to multiply eight bits of each activation instead of fifteen: the relative error of the products of the model's packed
layers on a text, and what becomes of its distributions.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from common import alternate, arguments, compare, finish, seconds
from gemstill.ops.native import loaded
from gemstill.ops.packed import Packed, pack, packed_linear
from gemstill.ops.panels import KINDS

D, HEADS, KEYS, INNER, LAYERS = 2304, 2048, 1024, 9216, 4
JOINT = [(D, (HEADS, KEYS, KEYS)), (HEADS, (D,)), (D, (INNER, INNER)), (INNER, (D,))]  # inputs, outputs side by side
VECTORS = (1, 2, 8)
MEMORY = 256 << 20  # bytes that are summed, in turn with the products: a shared machine's bandwidth comes and goes
Job = tuple[Callable[[], object], int]  # one round over all weights, their bytes


def ours(kind: str) -> Callable[[int], Job]:
    """All products with so many vectors in our kernels."""
    layers = [
        (inputs, outputs, [torch.randn(rows, inputs, dtype=torch.bfloat16) * 0.02 for rows in outputs])
        for _ in range(LAYERS)
        for inputs, outputs in JOINT
    ]
    if kind != "bfloat16":
        layers = [(inputs, outputs, [pack(weight, kind) for weight in plain]) for inputs, outputs, plain in layers]
    size = sum(weight.nbytes for _, _, weights in layers for weight in weights)

    def job(count: int) -> Job:
        jobs = []
        for inputs, outputs, weights in layers:
            x = torch.randn(count, inputs, dtype=torch.bfloat16)
            if kind != "bfloat16":
                jobs.append((packed_linear, (x, *weights)))
                continue
            out = torch.empty(count, sum(outputs), dtype=torch.bfloat16)
            numbers = [KINDS.index(kind)] * len(weights)
            jobs.append((torch.ops.gemstill.packed_linear, (x, weights, numbers, list(outputs), out)))
        return lambda: [work(*given) for work, given in jobs], size

    return job


def theirs(kind: str) -> Callable[[int], Job]:
    """The same in PyTorch's."""
    layers = []
    for _ in range(LAYERS):
        for inputs, outputs in JOINT:
            rows = sum(outputs)
            if kind == "bfloat16":
                layers.append((inputs, F.linear, (torch.randn(rows, inputs, dtype=torch.bfloat16),)))
            elif kind == "int8":
                whole = torch.randint(-127, 128, (rows, inputs), dtype=torch.int8)
                layers.append((inputs, torch._weight_int8pack_mm, (whole, torch.rand(rows, dtype=torch.bfloat16))))
            else:
                whole = torch.randint(0, 16, (rows, inputs), dtype=torch.int32)
                made = torch._convert_weight_to_int4pack_for_cpu(whole, 1)
                scales = torch.rand(inputs // 32, rows, 2, dtype=torch.bfloat16)
                layers.append((inputs, torch.ops.aten._weight_int4pack_mm_for_cpu, (made, 32, scales)))
    size = sum(part.nbytes for _, _, given in layers for part in given if isinstance(part, Tensor))

    def job(count: int) -> Job:
        jobs = [(work, (torch.randn(count, inputs, dtype=torch.bfloat16), *given)) for inputs, work, given in layers]
        return lambda: [work(*given) for work, given in jobs], size

    return job


def rate(job: Job) -> Callable[[], float]:
    work, size = job
    return lambda: size / seconds(work, at_least=0.2) / 1e9


@torch.inference_mode()
def speed(rounds: int) -> None:
    kernels = os.environ.get("GEMSTILL_KERNELS", "")
    bar = (
        None if kernels else 1.0
    )  # PyTorch's products are in the processor's best instruction set, whatever ours are in
    memory, rows = torch.ones(MEMORY // 8, dtype=torch.float64), []
    for kind in ("int8", "int4", "bfloat16"):
        mine, other = ours(kind), theirs(kind)
        for count in VECTORS:
            jobs = {"ours": rate(mine(count)), "peer": rate(other(count)), "read": rate((memory.sum, memory.nbytes))}
            found = alternate(jobs, rounds=rounds)
            limit = statistics.median(found["read"])
            name = f"{kind}, {count} vector{'s' if count > 1 else ''}"
            rows.append(compare(name, found["ours"], found["peer"], "GB/s", bar=bar, limit=limit))
    finish(rows, peer=f"torch {torch.__version__}", threads=torch.get_num_threads(), kernels=kernels or "native")


def rounded(x: Tensor, most: float) -> Tensor:
    """Activations as products take them: whole numbers up to `most`, and a scale for each 32."""
    blocks = torch.unflatten(x.float(), -1, (-1, 32))
    scale = blocks.abs().amax(-1, keepdim=True) / most
    return ((blocks / scale.clamp_min(1e-30)).round() * scale).flatten(-2).to(x.dtype)


@torch.inference_mode()
def accuracy(path: str, windows: int = 12, width: int = 256) -> None:
    from pydoc_data.topics import topics

    import gemstill
    from gemstill.ops import fused, packed

    model, tokenizer = gemstill.load(path, quantize="int8", dtype=torch.float32)
    ids = tokenizer.encode("\n\n".join(topics[name] for name in ("objects", "execmodel", "exceptions", "import")))
    plain, packed.FEW = fused.packed_linear, 0  # products with dequantized rows, so that nothing else is rounded
    kinds = {"8 bits": 127.0, "15 bits": 127.0 * 128}
    errors: dict[str, list[float]] = {name: [] for name in kinds}
    sums = {name: torch.zeros(3, dtype=torch.float64) for name in kinds}  # divergence, losses without and with
    for n in range(windows):
        text = torch.tensor([[tokenizer.bos_id, *ids[n * (width - 1) : (n + 1) * (width - 1)]]])
        labels = text[0, 1:, None]
        fused.packed_linear = plain
        exact = model(text)[0, :-1].log_softmax(-1)
        for name, most in kinds.items():

            def multiply(x: Tensor, *weights: Packed, name: str = name, most: float = most) -> Tensor:
                true, made = plain(x, *weights), plain(rounded(x, most), *weights)
                errors[name].append(float((made - true).norm() / true.norm()))
                return made

            fused.packed_linear = multiply
            found = model(text)[0, :-1].log_softmax(-1)
            divergence = (exact.exp() * (exact - found)).sum()
            losses = [-some.gather(1, labels).sum() for some in (exact, found)]
            sums[name] += torch.stack([divergence, *losses]).double()
    rows = []
    for name in kinds:
        divergence, before, after = (sums[name] / (windows * (width - 1))).tolist()
        rows.append(compare(f"relative error of a product, {name}", [statistics.median(errors[name])], None, ""))
        rows.append(compare(f"KL divergence, {name}", [divergence], None, "nats a token"))
        rows.append(compare(f"perplexity, {name}", [math.exp(after)], [math.exp(before)], ""))
        print(f"{name}: perplexity {math.exp(after - before) - 1:+.5%}")
    finish(rows, model=path, tokens=windows * (width - 1))


def main() -> None:
    args = arguments(__doc__, rounds=3, accuracy="")
    if args.accuracy:
        accuracy(args.accuracy)
    if not loaded():
        raise SystemExit("there are no native kernels here")
    speed(2 * args.rounds if args.full else args.rounds)


if __name__ == "__main__":
    main()
