"""`gemstill inspect`: what it says is what is there, and nothing of the weights is read for it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gemstill import cli, save
from gemstill.core.errors import Error
from gemstill.data.dataset import TokenDataset
from gemstill.data.shards import write_dataset
from gemstill.data.sources import Source
from gemstill.distill.teach import TeachConfig
from gemstill.distill.teach import run as teach
from gemstill.model.config import PRESETS, ModelConfig
from gemstill.model.slots import SlotCache
from gemstill.model.transformer import Transformer
from gemstill.report.inspect import describe
from gemstill.report.inspect_model import memory
from gemstill.report.inspect_text import text
from tests.model.tokenizers import TEXT, small_tokenizer

SHAPE = ModelConfig(
    vocab_size=384, hidden_size=64, intermediate_size=96, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=32,
    query_pre_attn_scalar=32, sliding_window=64, max_position=2000,
)  # fmt: skip


def made(place: Path, shape: ModelConfig = SHAPE, dtype: str | None = None) -> Path:
    save(Transformer(shape), small_tokenizer(), place, dtype=dtype)
    return place


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("inspect") / "model")


def shown(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert cli.main(["inspect", *map(str, words)]) == 0
    return capsys.readouterr().out


def test_a_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(shown(capsys, folder, "--json"))
    assert found["architecture"] == {"family": "Gemma 2", **asdict(SHAPE)}
    assert found["parameters"]["total"] == SHAPE.body_parameters + SHAPE.embedding_parameters
    assert found["parameters"]["without_embedding"] == SHAPE.body_parameters
    assert sum(found["parameters"]["parts"].values()) == found["parameters"]["total"]
    rows = {row["kind"]: row for row in found["tensors"]}
    assert rows["keys"] == {"kind": "keys", "type": "F32", "count": 4, "parameters": 4 * 64 * 64, "bytes": 4 * 4 * 4096}
    assert sum(row["bytes"] for row in rows.values()) == found["bytes"] == 4 * found["parameters"]["total"]
    assert found["tokenizer"]["entries"] == 320
    assert found["tokenizer"]["fingerprint"] == small_tokenizer().fingerprint
    assert any("64 rows of the embedding are padding" in what for what in found["unusual"])
    lines = shown(capsys, folder)
    for piece in ("Gemma 2 · 1", "4 (2 local, window 64; 2 global)", "queries", "memory", "2,000"):
        assert piece in lines


@pytest.mark.parametrize(("dtype", "type_"), [("f32", "F32"), ("bf16", "BF16"), ("q8_0", "Q8_0")])
def test_a_gguf_file_says_the_same(folder: Path, tmp_path: Path, dtype: str, type_: str) -> None:
    there, here = describe(folder), describe(made(tmp_path / "model.gguf", dtype=dtype))
    assert here["format"] == "GGUF file, version 3"
    for name in ("architecture", "parameters", "memory"):
        assert here[name] == there[name]
    types = {row["kind"]: row["type"] for row in here["tensors"]}
    assert types["embedding"] == types["MLP up"] == type_
    assert types["norms"] == "F32"
    assert here["tokenizer"]["entries"] == 320


def test_gemma_3_and_types(tmp_path: Path) -> None:
    shape = replace(
        SHAPE, qk_norm=True, layer_pattern=6, rope_local_theta=1e4, attn_logit_softcap=None, final_logit_softcap=None
    )
    found = describe(made(tmp_path / "model", shape, "bfloat16"))
    assert found["architecture"]["family"] == "Gemma 3 text"
    assert found["bytes"] == 2 * found["parameters"]["total"]
    assert {row["type"] for row in found["tensors"]} == {"BF16"}


@pytest.mark.parametrize("name", ["gemma2-9b", "gemma3-270m", "mini-1m"])
@pytest.mark.parametrize("tokens", [1, 100, 5000])
def test_memory_is_what_the_cache_and_the_parameters_take(name: str, tokens: int) -> None:
    shape = PRESETS[name]
    for dtype in (torch.float32, torch.bfloat16):
        assert SlotCache.bytes_of(shape, tokens, dtype) == SlotCache(shape, 1, tokens, dtype, "meta").bytes
    weights = {row["precision"]: row["weights_bytes"] for row in memory(shape)}
    total = shape.body_parameters + shape.embedding_parameters
    assert weights["float32"] == 4 * total
    assert 2 * total <= weights["bfloat16"] < 2.01 * total  # norms are counted in float32
    assert str(shape.max_position) in memory(shape)[0]["with_context_bytes"]


def test_no_weights_are_read(tmp_path: Path) -> None:
    """A file whose tensors are a hole of 30 GB: to read them would take minutes and more memory than there is."""
    shape = replace(PRESETS["gemma2-9b"], vocab_size=320)
    place = tmp_path / "model"
    made(place)
    config = json.loads((place / "config.json").read_text())
    from gemstill.checkpoint.hf_config import to_hf

    (place / "config.json").write_text(json.dumps(config | to_hf(shape)))
    with torch.device("meta"):
        model = Transformer(shape)
    header: dict[str, Any] = {}
    at = 0
    for name, parameter in model.named_parameters():
        size = 4 * parameter.numel()
        header[f"model.{name}"] = {"dtype": "F32", "shape": list(parameter.shape), "data_offsets": [at, at + size]}
        at += size
    raw = json.dumps(header).encode()
    with open(place / "model.safetensors", "wb") as handle:
        handle.write(len(raw).to_bytes(8, "little") + raw)
        handle.truncate(8 + len(raw) + at)
    code = (
        "import json, resource; from gemstill.report.inspect import describe\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"found = describe({str(place)!r})\n"
        "print(found['bytes'], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    size, memory_used = map(int, done.stdout.split())
    assert size == at > 30e9
    assert memory_used < 2e6 if sys.platform == "linux" else True  # kilobytes; torch alone takes a quarter of it


def test_what_is_unusual_is_told(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "model"
    shutil.copytree(folder, place)
    config = json.loads((place / "config.json").read_text())
    changed = {"auto_map": {"AutoModel": "evil.py"}, "query_pre_attn_scalar": 100, "intermediate_size": 97}
    (place / "config.json").write_text(json.dumps(config | changed | {"final_logit_softcapping": None}))
    (place / "evil.py").write_text("raise SystemExit")
    (place / "pytorch_model.bin").write_bytes(b"\x80")
    (place / "tokenizer.model").unlink()
    unusual = "\n".join(describe(place)["unusual"])
    for piece in (
        "Python code of its own", "evil.py, pytorch_model.bin", "scaled by 100", "no multiples of 32", "soft cap",
        "tensors of another shape: ", "there is no tokenizer.model",
    ):  # fmt: skip
        assert piece in unusual
    (place / "tokenizer.json").write_text("{}")
    found = describe(place)
    assert "its tokenizer cannot be used" in "\n".join(found["unusual"])
    assert text(found)


def test_what_comes_from_a_file_is_printable(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "model"
    shutil.copytree(folder, place)
    (place / "a\x1b[2J.py").write_text("")
    assert "\x1b" not in shown(capsys, place)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("run")
    (place / "text").mkdir()
    (place / "text" / "a.txt").write_text("".join(TEXT))
    (place / "text" / "b.txt").write_text("".join(TEXT[:20]))
    tokenizer = small_tokenizer()
    write_dataset(Source(place / "text"), tokenizer, place / "data", heldout_fraction=0.0)
    made(place / "model")
    teach(TeachConfig(teacher=str(place / "model"), data=place / "data" / "train", output=place / "store", window=64))
    return place


def test_a_data_set(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = TokenDataset.open(run / "data" / "train")
    found = json.loads(shown(capsys, run / "data" / "train", "--json"))
    assert found["kind"] == "a data set of tokens"
    for name, value in {"tokens": dataset.num_tokens, "documents": 2, "vocab_size": 320, "shards": 1}.items():
        assert found["dataset"][name] == value
    assert found["dataset"]["fingerprint"] == dataset.fingerprint
    both = json.loads(shown(capsys, run / "data", "--json"))
    assert both["datasets"]["train"] == found["dataset"]
    assert f"tokens                 {dataset.num_tokens:,}" in shown(capsys, run / "data" / "train")


def test_a_store(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(shown(capsys, run / "store", "--json"))
    assert found["kind"] == "a probability store"
    dataset = TokenDataset.open(run / "data" / "train")
    assert (found["store"]["num_tokens"], found["store"]["window"]) == (dataset.num_tokens, 64)
    assert found["store"]["complete"] is True
    assert found["store"]["weighted_entries_per_row"] + found["store"]["sharing_entries_per_row"] >= 1
    assert found["unusual"] == []
    part = tmp_path / "store"
    shutil.copytree(run / "store", part)
    index = json.loads((part / "store.json").read_text())
    (part / "store.json").write_text(json.dumps(index | {"complete": False, "blocks": []}))
    next((part / "data").iterdir()).unlink()
    assert "it is not finished: 0 of" in shown(capsys, part)


def test_a_run(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "loss": 3}\n{"ste')
    shutil.copytree(folder, tmp_path / "model")
    for step in ("step-00000001", "step-00000002", "step-00000002.partial"):
        (tmp_path / "state" / step).mkdir(parents=True)
        (tmp_path / "state" / step / ".metadata").write_bytes(b"\x80")
    found = json.loads(shown(capsys, tmp_path, "--json"))
    assert found["run"] == {
        "steps": 2, "states": ["step-00000001", "step-00000002"], "holds": {"model": "a model's folder"},
    }  # fmt: skip
    assert "the run is not finished: 2 steps are done" in found["unusual"][0]
    (tmp_path / "summary.json").write_text('{"steps": 2, "perplexity": 9.5, "deep": {"er": 1}}')
    lines = shown(capsys, tmp_path)
    assert "summary perplexity  9.5" in lines
    assert "not finished" not in lines
    for state in (tmp_path / "state", tmp_path / "state" / "step-00000002"):
        assert cli.main(["inspect", str(state)]) == 2
        assert "is a training state, which is read by pickle" in capsys.readouterr().err


def test_a_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small_tokenizer().save(tmp_path)
    found = json.loads(shown(capsys, tmp_path, "--json"))
    assert found["tokenizer"]["entries"] == 320
    assert found["template"]["turns"] == "as in the Gemma report"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.gguf", b"GGUF", "is too short"),
        ("a.gguf", b"nothing", "is no GGUF file"),
        ("a.txt", b"nothing", "is no model"),
        ("a.pkl", b"\x80\x04", "is a pickle"),
    ],
)
def test_wrong_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    assert cli.main(["inspect", str(tmp_path / name)]) == 2
    told = capsys.readouterr()
    assert message in told.err
    assert (told.out, told.err.count("\n")) == ("", 1)


def test_another_architecture_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    assert cli.main(["inspect", str(tmp_path)]) == 2
    assert "holds a model of type 'qwen2'" in capsys.readouterr().err
    from gemstill.checkpoint.gguf_file import write_gguf

    write_gguf(tmp_path / "llama.gguf", {"general.architecture": "llama"}, [])
    assert cli.main(["generate", str(tmp_path / "llama.gguf"), "x"]) == 2
    assert "holds a model of architecture 'llama'; only gemma2 and gemma3 can be opened" in capsys.readouterr().err


def test_damaged_shards_are_an_error_of_ours(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "model"
    shutil.copytree(folder, place)
    data = (place / "model.safetensors").read_bytes()
    (place / "model.safetensors").write_bytes(data[:5000])
    with pytest.raises(Error, match="safetensors"):
        describe(place)
