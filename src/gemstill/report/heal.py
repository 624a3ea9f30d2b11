"""What pruning took and healing gave back, as figures and as a table."""

from __future__ import annotations

import math
from typing import Any

from gemstill.core.progress import duration
from gemstill.core.steps import Steps

NAMES = {
    "teacher": "teacher",
    "pruned": "pruned, not healed",
    "next_token": "healed by next tokens",
    "distilled": "healed by the teacher",
}


def summarise(tokens: int, steps: Steps, ratio: tuple[float, float, float]) -> dict[str, Any]:
    """The figures of a finished run of `gemstill heal`.

    tokens: that each student was trained on. ratio: of the perplexities of the student healed by the teacher and of
    that healed by next tokens, with its interval.
    """
    compared, exported, taught = (steps.result(name) for name in ("compare", "export", "teach"))
    scores = compared["next_token"]
    whole, none = (compared[name]["heldout_nll"] for name in ("teacher", "pruned"))
    rows: dict[str, Any] = {}
    for name in NAMES:
        row = {key: compared[name][key] for key in ("heldout_nll", "perplexity", "agreement")}
        row["gguf_bytes"] = exported["bytes"][name]
        # Of what pruning took, in nats a token, the part that training gave back.
        row["healed"] = (none - row["heldout_nll"]) / (none - whole) if none > whole else math.nan
        if name in ("next_token", "distilled"):
            trained = steps.result(name)
            row |= {key: trained[key] for key in ("tokens_seen", "flops", "learning_rate", "precision")}
            row["seconds"] = steps.each[name]
        rows[name] = row
    return {
        "tokens": tokens,
        "prune": steps.result("prune"),
        "heldout_tokens": sum(scores["tokens"]),
        "heldout_documents": len(scores["tokens"]),
        "store_tokens": taught["tokens"],
        "store_bytes_per_token": taught["bytes_per_token"],
        "gguf_dtype": exported["dtype"],
        "llama_cpp": exported["llama_cpp"],
        "trials": {name.removeprefix("trial "): steps.result(name) for name in steps.each if name.startswith("trial ")},
        **dict(zip(("ratio", "ratio_low", "ratio_high"), ratio, strict=True)),
        "seconds": steps.each,
        "peak_rss_bytes": steps.done["peak_rss_bytes"],
        **rows,
    }


def show(summary: dict[str, Any]) -> None:
    """Print the comparison."""
    print(f"{'':22}  {'held-out loss':>13}  {'perplexity':>10}  {'top-1':>6}  {'healed':>6}  {'GGUF':>8}  {'time':>7}")
    for name, title in NAMES.items():
        row = summary[name]
        healed = "" if name in ("teacher", "pruned") else f"{row['healed']:.0%}"
        size = f"{row['gguf_bytes'] / 2**20:.0f} MiB" if row["gguf_bytes"] else ""
        time = duration(row["seconds"]) if "seconds" in row else ""
        print(
            f"{title:22}  {row['heldout_nll']:13.3f}  {row['perplexity']:10.2f}  {row['agreement']:6.1%}  "
            f"{healed:>6}  {size:>8}  {time:>7}"
        )
    low, high = summary["ratio_low"], summary["ratio_high"]
    print(
        f"perplexity healed by the teacher / by next tokens: {summary['ratio']:.3f} ({low:.3f} to {high:.3f}), "
        f"{summary['tokens']:,} tokens each; store {summary['store_bytes_per_token']:.1f} bytes a token"
    )
    if there := summary["llama_cpp"]:
        print(
            f"the file in llama.cpp: perplexity {there['perplexity']:.2f} over {there['tokens']} tokens, "
            f"here {there['ours']:.2f}"
        )
