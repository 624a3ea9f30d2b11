"""Pruning: what is left is the network with the rest left out, what is useless goes first, the pattern stays one."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from gemstill import cli
from gemstill.checkpoint.foreign import save_foreign
from gemstill.checkpoint.source import load, save
from gemstill.core.errors import Error
from gemstill.data.calibration import Calibration, calibration
from gemstill.data.shards import write_dataset
from gemstill.distill import prune
from gemstill.distill.importance import channel_importance, choose_blocks, fits, largest, loss_of, scored
from gemstill.distill.layouts import Prunable, cut
from gemstill.distill.prune import PruneConfig
from gemstill.model.adapter import Adapter
from gemstill.model.transformer import Transformer
from tests.checkpoint.gguf_models import GEMMA3
from tests.model import reference
from tests.model.tokenizers import TEXT, small_tokenizer

SHAPE2 = replace(reference.BASE, num_layers=6, intermediate_size=64)
SHAPE3 = replace(reference.GEMMA3, num_layers=12, layer_pattern=3)


def llama(**changes: Any) -> Adapter:
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "head_dim": 8,
             "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**(sizes | changes)))
    reference.roughen(model)
    return Adapter(model.double().eval())


def text(vocab: int = 61, rows: int = 6, width: int = 24) -> Calibration:
    tokens = torch.randint(vocab, (rows, width), generator=torch.Generator().manual_seed(5))
    lengths = torch.tensor([width, 9, width, 17, 2, width][:rows])
    return Calibration(tokens * (torch.arange(width) < lengths[:, None]), lengths, "random tokens")


def written_by(model: Any, rows: int = 6, width: int = 24) -> Calibration:
    """Text that the network itself draws, so that none is likelier by another."""
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(61, (rows, 1), generator=generator)
    with torch.no_grad():
        while tokens.shape[1] < width:
            drawn = torch.multinomial(model(tokens)[:, -1].softmax(-1), 1, generator=generator)
            tokens = torch.cat([tokens, drawn], 1)
    return Calibration(tokens, torch.full((rows,), width), "its own text")


def left_out(model: Any, kept: list[int], channels: list[torch.Tensor]) -> Any:
    """The whole network with the other blocks skipped and the other channels' activations multiplied by zero."""
    model = copy.deepcopy(model)
    net = Prunable(model)
    for block in net.blocks:
        block.register_forward_hook(lambda me, x, out: out if me.place in kept else x[0])
    for place, block in enumerate(net.blocks):
        block.place = place
        if place in kept:
            mask = torch.zeros(block.mlp.down_proj.in_features, dtype=torch.float64)
            mask[channels[kept.index(place)]] = 1
            block.mlp.down_proj.weight.data *= mask
    return model


@pytest.mark.parametrize("kind", ["gemma2", "gemma3", "llama", "llama with biases"])
def test_the_pruned_network_is_the_whole_one_with_the_rest_left_out(kind: str) -> None:
    shape = None
    if kind.startswith("gemma"):
        whole, kept = (SHAPE2, [0, 3, 4, 5]) if kind == "gemma2" else (SHAPE3, [1, 3, 8, 9])
        model: Any = reference.network(whole, torch.float64)
        shape = replace(whole, num_layers=4, intermediate_size=32)
    else:
        model, kept = llama(mlp_bias="biases" in kind), [0, 2, 3]
    generator = torch.Generator().manual_seed(1)
    channels = [torch.randperm(64, generator=generator)[:32].sort().values for _ in kept]
    expected, tokens = left_out(model, kept, channels), reference.text(reference.BASE)
    cut(Prunable(model), shape, kept, channels)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), expected(tokens), rtol=1e-12, atol=1e-12)
    assert model.config.num_layers == len(kept)
    assert model.config.intermediate_size == 32


def useless(model: Any, blocks: tuple[int, ...], channels: dict[int, torch.Tensor]) -> Any:
    """Blocks that hardly change the stream, and channels that hardly add to it."""
    with torch.no_grad():
        for place, block in enumerate(Prunable(model).blocks):
            if place in blocks:
                for name in ("post_attention_layernorm", "post_feedforward_layernorm"):
                    if isinstance(model, Transformer):
                        getattr(block, name).weight.fill_(-1 + 1e-4)  # a gain of next to nothing
                if not isinstance(model, Transformer):
                    block.self_attn.o_proj.weight.mul_(1e-4)
                    block.mlp.down_proj.weight.mul_(1e-4)
            if place in channels:
                block.mlp.down_proj.weight[:, channels[place][::2]] *= 1e-4
                block.mlp.up_proj.weight[channels[place][1::2]] *= 1e-4
    return model


@pytest.mark.parametrize("kind", ["gemma2", "gemma3", "llama"])
def test_planted_useless_blocks_and_channels_go_first(kind: str) -> None:
    planted, dead = {"gemma2": (2, 3), "gemma3": (4, 7), "llama": (1, 2)}[kind], torch.tensor([5, 6, 20, 63])
    model = llama() if kind == "llama" else reference.network(SHAPE2 if kind == "gemma2" else SHAPE3, torch.float64)
    useless(model, planted, {0: dead})
    whole, net = model.config, Prunable(model)
    kinds = [not whole.is_local(block) for block in range(whole.num_layers)]
    wanted = [kind for block, kind in enumerate(kinds) if block not in planted]
    own, blocks = written_by(model), list(net.blocks)
    before = loss_of(net, own)
    depth = choose_blocks(net, own, kinds, wanted)
    assert {block for block, _ in depth.dropped} == set(planted)
    assert depth.kept == [block for block in range(whole.num_layers) if block not in planted]
    others = [rise for block, rise in enumerate(depth.alone) if block not in planted]
    assert max(abs(depth.alone[block]) for block in planted) < 1e-2 * min(map(abs, others))
    assert max(depth.influence[block] for block in planted) < min(
        turn for block, turn in enumerate(depth.influence) if block not in planted
    )
    assert depth.base == pytest.approx(before)
    assert depth.loss == pytest.approx(before, abs=1e-3)
    assert list(net.blocks) == blocks  # measuring leaves all as it was
    importance = channel_importance(net, own, depth.kept)
    assert set(range(64)) - set(largest(importance[0], 60).tolist()) == set(dead.tolist())
    assert list(net.blocks) == blocks


def test_the_loss_without_a_block_is_that_of_the_network_without_it() -> None:
    """Only what comes after a missing block is run again, on the stream kept from before."""
    model = reference.network(SHAPE2, torch.float64)
    depth = choose_blocks(Prunable(model), text(), [0] * 6, [0] * 3)
    batches = list(text().batches(10_000))
    assert len(depth.dropped) == 3
    kept = list(range(6))
    for block, loss in depth.dropped:
        kept.remove(block)
        small = left_out(model, kept, [torch.arange(64)] * len(kept))
        total = count = 0.0
        for batch, mark in zip(batches, scored(batches, 0), strict=True):
            with torch.no_grad():
                scores = small(batch.tokens).log_softmax(-1)
            total -= float(scores[mark].gather(1, batch.tokens.roll(-1, 1)[mark][:, None]).sum())
            count += int(mark.sum())
        assert loss == pytest.approx(total / count, rel=1e-6)
    assert count == int((text().lengths - 1).sum())  # so few are all scored
    with torch.no_grad():
        expected = [choose(model, without) - depth.base for without in range(6)]
    assert depth.alone == pytest.approx(expected, rel=1e-6)


def choose(model: Transformer, without: int) -> float:
    kept = [block for block in range(6) if block != without]
    return loss_of(Prunable(left_out(model, kept, [torch.arange(64)] * 5)), text())


def test_channel_importance_is_the_size_of_what_a_channel_adds() -> None:
    model = llama()
    seen: list[torch.Tensor] = []
    block: Any = model.layers[1]
    handle = block.mlp.down_proj.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    with torch.no_grad():
        model(text().tokens)
    handle.remove()
    activations = seen[0][text().real]
    added = activations[:, :, None] * block.mlp.down_proj.weight.T  # [tokens, M, D]
    expected = added.square().sum(-1).mean(0).sqrt()
    torch.testing.assert_close(
        channel_importance(Prunable(model), text(), [0, 1, 2, 3])[1].double(), expected, rtol=1e-5, atol=0
    )


def test_fits_agrees_with_trying_all() -> None:
    from itertools import combinations, product

    for kinds in product("ab", repeat=5):
        for wanted in product("ab", repeat=3):
            assert fits(kinds, wanted) == (wanted in set(combinations(kinds, 3)))


@pytest.fixture(scope="module")
def model3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gemma 3 of twelve layers, every third global, on disk."""
    folder = tmp_path_factory.mktemp("prune") / "model"
    shape = replace(GEMMA3, num_layers=12, layer_pattern=3)
    save(reference.network(shape), small_tokenizer(), folder, card="---\nlicense: gemma\n---\n# A model\n")
    return folder


@pytest.fixture(scope="module")
def books(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text") / "books"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.txt").write_text("".join(TEXT[number * 15 : number * 15 + 15]))
    return folder


def test_command(model3: Path, books: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From a checkpoint to a smaller one that transformers and llama.cpp's format take, with a card that says all."""
    words = ["prune", str(model3), str(tmp_path / "small"), "--layers", "6", "--intermediate-size", "64"]
    words += ["--text", str(books), "--tokens", "600", "--window", "64"]
    assert cli.main([*words, "--dry-run"]) == 0
    assert "6 of 12" in capsys.readouterr().out
    assert not (tmp_path / "small").exists()
    assert cli.main(words) == 0
    assert "6 of 12" in capsys.readouterr().out
    model, tokenizer = load(tmp_path / "small", dtype=torch.float32)
    assert (model.config.num_layers, model.config.intermediate_size, model.config.layer_pattern) == (6, 64, 3)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "small", attn_implementation="eager").eval()
    tokens = reference.text(model.config)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-4)
    save(model, tokenizer, tmp_path / "small.gguf", dtype="q8_0")
    card = (tmp_path / "small" / "README.md").read_text()
    rows = [line.split(" | ") for line in card.splitlines() if line.startswith("| ") and line[2].isdigit()]
    blocks, widths = rows[:12], rows[12:]
    kept = [int(row[0][2:]) for row in blocks if row[3].startswith("yes")]
    assert [int(row[0][2:]) for row in widths] == kept
    assert [(block + 1) % 3 == 0 for block in kept] == [False, False, True] * 2
    whole = load(model3, dtype=torch.float32)[0]
    for place, row in enumerate(widths):
        bits = bin(int(row[2].strip("` |"), 16))[2:].zfill(whole.config.intermediate_size)
        channels = torch.tensor([n for n, bit in enumerate(bits) if bit == "1"])
        ours, mlp = model.layers[place].mlp, whole.layers[kept[place]].mlp
        assert torch.equal(ours.gate_proj.weight, mlp.gate_proj.weight[channels])
        assert torch.equal(ours.down_proj.weight, mlp.down_proj.weight[:, channels])
    assert 'license: "gemma"' in card
    for name in ("model.safetensors", "README.md"):  # the same again, and over what is ours
        first = (tmp_path / "small" / name).read_bytes()
        assert cli.main(words) == 0
        assert (tmp_path / "small" / name).read_bytes() == first


def test_llama_cpp_runs_another_pattern_than_gemma_3_has(tmp_path: Path) -> None:
    """Its own default is every sixth block; the file says otherwise."""
    pytest.importorskip("llama_cpp")
    from tests.checkpoint.test_gguf_llama import open_llama, scores

    shape = replace(GEMMA3, num_layers=12, sliding_window=8)
    model = reference.network(shape)
    kept, width = [0, 2, 5, 6, 9, 11], 64
    small = replace(shape, num_layers=6, layer_pattern=3, intermediate_size=width)
    cut(Prunable(model), small, kept, [torch.arange(width)] * 6)
    save(model, small_tokenizer(), tmp_path / "small.gguf", dtype="f32")
    row = reference.text(small, batch=1, time=60)[0].tolist()
    theirs = scores(open_llama(tmp_path / "small.gguf", logits_all=True), row).double().log_softmax(-1)
    with torch.no_grad():
        ours = model(torch.tensor([row]))[0].double().log_softmax(-1)
    assert float((ours.exp() * (ours - theirs)).sum(-1).mean()) < 1e-5


def test_text_by_default_is_pythons_own(model3: Path, tmp_path: Path) -> None:
    prune.run(PruneConfig(str(model3), tmp_path / "small", intermediate_size=32, tokens=128, window=64))
    assert "Python's language reference" in (tmp_path / "small" / "README.md").read_text()
    assert load(tmp_path / "small")[0].config.num_layers == 12


def test_a_data_set_of_the_models_tokenizer(model3: Path, books: Path, tmp_path: Path) -> None:
    data = write_dataset(books, small_tokenizer(), tmp_path / "data", heldout_fraction=0, workers=1).train
    options = {
        "encode": None,
        "bos_id": data.bos_id,
        "tokens": 300,
        "window": 32,
        "fingerprint": data.tokenizer_fingerprint,
    }
    found = calibration(text=str(data.folder), **options)
    stream = data.read(0, data.num_tokens).tolist()
    joined = " ".join(map(str, stream))
    for row, length in zip(found.tokens.tolist(), found.lengths.tolist(), strict=True):
        assert row[0] == data.bos_id
        assert " ".join(map(str, row[1:length])) in joined
        assert data.eos_id not in row[:length]
        assert not any(row[length:])
    assert 100 < int(found.lengths.sum()) <= 320
    config = PruneConfig(str(model3), tmp_path / "small", layers=9, text=str(data.folder), tokens=100, window=32)
    assert prune.run(config)["layers"] == "9 of 12"
    with pytest.raises(Error, match="was made with tokenizer"):
        calibration(text=str(data.folder), **(options | {"fingerprint": "another"}))


def test_text_is_taken_from_all_over_and_from_within_documents(tmp_path: Path) -> None:
    for number in range(8):
        (tmp_path / f"{number}.txt").write_text(f" {number}" * 500)
    found = calibration(lambda t: [ord(c) for c in t if c != " "], 1, str(tmp_path), tokens=640, window=20)
    rows = [{chr(i) for i in row[1:n]} for row, n in zip(found.tokens.tolist(), found.lengths.tolist(), strict=True)]
    assert all(len(row) == 1 for row in rows)  # no piece runs over the end of a document
    assert set().union(*rows) == set("01234567")
    assert sum(int(batch.lengths.sum()) for batch in found.batches(100)) == int(found.lengths.sum())
    assert all(batch.tokens.numel() <= 100 for batch in found.batches(100))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"layers": 13}, "layers is 13, the model has 12"),
        ({"layers": 0}, "layers is 0; it must be above 0"),
        ({"intermediate_size": 4096}, "intermediate_size is 4096, the model has 96"),
        ({"intermediate_size": 40}, "intermediate_size 40 is no multiple of 32, .* take 32 or 64"),
        ({"layers": None}, "nothing says how much is kept"),
        ({"layers": 12}, "all of the model would be kept"),
        ({"layers": 8, "layer_pattern": 1}, "no 8, in order, of which every 1. is global"),
        ({"window": 1}, "window is 1"),
        ({"text": "nowhere"}, "nowhere: there is no such file or folder"),
        ({"target": Path("model.gguf")}, "is the name of a file"),
        ({"source": "nowhere"}, "there is no such file or folder"),
    ],
)
def test_bad_input(model3: Path, tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(Error, match=sentence):
        prune.run(PruneConfig(**({"source": str(model3), "target": tmp_path / "small", "layers": 6} | changes)))
    assert not (tmp_path / "small").exists()


def test_no_text_and_a_strangers_folder(model3: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "notes.txt").write_text("mine")
    config = PruneConfig(str(model3), tmp_path / "small", layers=6, text=str(tmp_path / "empty"))
    with pytest.raises(Error, match="no file matches"):
        prune.run(config)
    (tmp_path / "empty" / "a.txt").write_text("\n \n")
    with pytest.raises(Error, match="too little text"):
        prune.run(config)
    for job in (prune.run, prune.plan):
        with pytest.raises(Error, match="holds files that no checkpoint of ours has"):
            job(replace(config, target=tmp_path / "theirs"))
    assert [path.name for path in (tmp_path / "theirs").iterdir()] == ["notes.txt"]


def test_a_llama_on_disk(books: Path, tmp_path: Path) -> None:
    adapter = llama(vocab_size=320, tie_word_embeddings=True)
    save_foreign(adapter, dict(adapter.named_parameters()), small_tokenizer(), tmp_path / "llama", card="# A Llama\n")
    options: dict[str, Any] = {"text": str(books), "tokens": 300, "window": 32}
    config = PruneConfig(str(tmp_path / "llama"), tmp_path / "small", layers=2, intermediate_size=32, **options)
    planned, figures = prune.plan(config), prune.run(config)
    for name in ("layers", "channels", "parameters", "parameters_without_embedding"):
        assert planned[name] == figures[name]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert isinstance(theirs, LlamaForCausalLM)
    assert theirs.config.num_hidden_layers == len(theirs.model.layers) == 2
    assert sum(p.numel() for p in theirs.parameters()) == figures["parameters"]
    kept = [int(n) for n in figures["kept_layers"].split(", ")]
    original: Any = adapter.layers[kept[1]]
    assert torch.equal(
        theirs.model.layers[1].self_attn.q_proj.weight, original.self_attn.q_proj.weight.to(theirs.dtype)
    )
    tokens = torch.randint(320, (1, 9))
    ids = theirs.generate(tokens, max_new_tokens=3, do_sample=False)  # with its cache of keys and values
    with torch.no_grad():
        assert ids[0, -1] == theirs(ids[:, :-1], use_cache=False).logits[0, -1].argmax()
    with pytest.raises(Error, match="layer_pattern is for Gemma alone"):
        prune.run(replace(config, layer_pattern=2))
    raw = json.loads((tmp_path / "small" / "config.json").read_text())
    assert raw["intermediate_size"] == 32


def test_other_layouts_are_refused() -> None:
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=32, n_layer=3, n_head=4, n_positions=64, **no_dropout))
    with pytest.raises(Error, match="no mlp of gate_proj"):
        Prunable(Adapter(gpt.eval()))
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
             "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    mixed = Qwen2Config(**sizes, use_sliding_window=True, sliding_window=8, max_window_layers=2)
    with pytest.raises(Error, match="local and global blocks"):
        Prunable(Adapter(Qwen2ForCausalLM(mixed).eval()))
