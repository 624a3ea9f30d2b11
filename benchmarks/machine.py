"""What can this machine do? Products in each dtype and read bandwidth, measured anew.

python benchmarks/machine.py
"""

from __future__ import annotations

from common import arguments, compare, finish
from gemstill.core.machine import probe


def main() -> None:
    arguments(__doc__)
    found = probe(fresh=True)
    rows = [
        compare(f"products, {name}", [getattr(found, name)], None, unit)
        for name, unit in (("float32", "GFLOP/s"), ("bfloat16", "GFLOP/s"), ("int8", "GOP/s"))
    ]
    rows.append(compare("reads", [found.read], None, "GB/s"))
    finish(rows)


if __name__ == "__main__":
    main()
