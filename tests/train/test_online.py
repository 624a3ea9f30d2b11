"""A teacher at hand while the student learns, of any kind; and students of any kind."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, make_recipe
from test_ranks import figures, torchrun
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from gemstill.checkpoint.source import save
from gemstill.core.errors import Error
from gemstill.data.dataset import TokenDataset
from gemstill.data.loader import Batch, Loader
from gemstill.distill.teachers import ModelTeacher
from gemstill.model.adapter import Adapter
from gemstill.model.transformer import Transformer
from gemstill.ops import columns
from gemstill.text.tokenizer import Tokenizer
from gemstill.train.config import (
    HardConfig,
    ModelChoice,
    OptimizerConfig,
    SourceConfig,
    TeacherChoice,
    TrainConfig,
    identity,
)
from gemstill.train.loop import Loop
from gemstill.train.objectives import FromTeacher
from gemstill.train.run import plan, train

VOCAB = 300


def gemma(rows: int = VOCAB, seed: int = 7) -> Transformer:
    model = Transformer(ModelChoice("mini-1m", TINY).shape().with_vocab(rows), seed=seed)
    with torch.no_grad():  # far from uniform
        model.embed_tokens.weight.mul_(8)
    return model


def llama(rows: int = VOCAB) -> Any:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=rows, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    return model


@pytest.fixture(scope="module")
def places(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models in their folders, with the corpus' tokenizer."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = Tokenizer.open(corpus / "tokenizer")
    card = "---\nlicense: gemma\n---\n"
    save(gemma(), tokenizer, root / "gemma", card=card)
    config = GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    for name, model in {"llama": llama(320), "gpt2": GPT2LMHeadModel(config)}.items():
        model.save_pretrained(root / name)
        tokenizer.save(root / name)
        (root / name / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    return {name: root / name for name in ("gemma", "llama", "gpt2")}


@pytest.fixture(scope="module")
def batch(corpus: Path) -> Batch:
    dataset = TokenDataset.open(corpus / "data" / "train")
    return Loader([(dataset, 1.0)], 32, 4, 0).batch(0)


def plain_loss(
    student: Any, teacher: Any, batch: Batch, t: float, fraction: float, divergence: str = "forward", beta: float = 0.5
) -> float:
    """The same by dense logits and autograd's own operations, in float64."""
    with torch.no_grad():
        q, p = (
            model(batch.tokens, documents=batch.documents)[..., :VOCAB].flatten(0, 1).double()
            for model in (teacher, student)
        )
    q, student_p = (q / t).softmax(-1), (p / t).softmax(-1)
    middle = beta * q + (1 - beta) * student_p
    soft = (
        t**2
        * {
            "forward": lambda: -(q * student_p.log()).sum(-1),
            "reverse": lambda: (student_p * (student_p.log() - q.log())).sum(-1),
            "jensen-shannon": lambda: (
                beta * q * (q.log() - middle.log()) + (1 - beta) * student_p * (student_p.log() - middle.log())
            ).sum(-1),
        }[divergence]()
    )
    hard = torch.nn.functional.cross_entropy(p, batch.labels.flatten(), reduction="none")
    return float((((1 - fraction) * soft + fraction * hard) * batch.weight.flatten()).sum())


@pytest.mark.parametrize(("t", "fraction"), [(1.0, 0.0), (1.0, 0.3), (2.0, 0.0), (2.0, 0.3)])
@pytest.mark.parametrize("kind", ["gemma", "padded gemma", "llama"])
def test_the_loss_is_that_of_both_sides_dense_logits(batch: Batch, kind: str, t: float, fraction: float) -> None:
    made = {"gemma": gemma, "padded gemma": lambda: gemma(320), "llama": lambda: Adapter(llama(308))}
    teacher, student = made[kind](), gemma(seed=1)
    hard = HardConfig(fraction, fraction)
    objective = FromTeacher(ModelTeacher(teacher), hard, 10, vocab_size=VOCAB, rows=VOCAB, temperature=t)
    prepared = objective.prepare(batch, 0)
    loss, _ = objective.loss(student, prepared)
    assert objective.weight(prepared) == float(batch.weight.sum())
    assert float(loss.detach()) == pytest.approx(plain_loss(student, teacher, batch, t, fraction), rel=1e-5)
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert float(student.embed_tokens.weight.grad.abs().sum()) > 0


@pytest.mark.parametrize(("t", "fraction"), [(1.0, 0.0), (1.0, 0.3), (2.0, 0.3)])
@pytest.mark.parametrize(("divergence", "beta"), [("reverse", 0.5), ("jensen-shannon", 0.5), ("jensen-shannon", 0.1)])
def test_other_divergences(batch: Batch, divergence: Any, beta: float, t: float, fraction: float) -> None:
    teacher, student, hard = gemma(), gemma(seed=1), HardConfig(fraction, fraction)
    objective = FromTeacher(
        ModelTeacher(teacher), hard, 10, vocab_size=VOCAB, rows=VOCAB, temperature=t, divergence=divergence, beta=beta
    )
    loss, _ = objective.loss(student, objective.prepare(batch, 0))
    known = plain_loss(student, teacher, batch, t, fraction, divergence, beta)
    assert float(loss.detach()) == pytest.approx(known, rel=1e-4)


def test_a_student_with_padding_rows_learns_from_a_teacher_without(batch: Batch) -> None:
    teacher, student = gemma(), gemma(320, seed=1)
    objective = FromTeacher(ModelTeacher(teacher), HardConfig(), 10, vocab_size=VOCAB, rows=320)
    loss, _ = objective.loss(student, objective.prepare(batch, 0))
    assert float(loss.detach()) == pytest.approx(plain_loss(student, teacher, batch, 1, 0), rel=1e-5)


def small(corpus: Path, run: Path, **changes: Any) -> Any:
    rates = OptimizerConfig(learning_rate=0.005, embedding_rate=0.005)
    return make_recipe(corpus, run, **({"evaluate_every": 0, "optimizer": rates} | changes))


def begin(config: TrainConfig, stop: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train until step `stop`, which a Ctrl-C breaks off."""
    step = Loop._train_step

    def cut(self: Loop) -> Any:
        if self.step == stop:
            raise KeyboardInterrupt
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_train_step", cut)
        with pytest.raises(KeyboardInterrupt):
            train(config)


@pytest.mark.parametrize("kind", ["gemma", "llama"])
def test_a_run_learns_its_teacher_and_goes_on_where_it_was(
    corpus: Path, places: dict[str, Path], tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(corpus, tmp_path / "run", teacher=TeacherChoice(str(places[kind])), hard=HardConfig(0.5, 0.1))
    summary = train(config)
    losses = figures(config, "loss")
    assert losses[-1] < losses[0] - 0.3
    assert summary["teacher_flops"] > 0
    card = (Path(config.run) / "model" / "README.md").read_text()
    assert f"its teacher, {kind}" in card
    assert {"gemma": 'license: "gemma"', "llama": 'license: "apache-2.0"'}[kind] in card
    half = small(corpus, tmp_path / "again", teacher=config.teacher, hard=config.hard)
    begin(half, stop=6, monkeypatch=monkeypatch)
    train(half)
    assert figures(half, "loss") == losses
    other = dataclasses.replace(half, teacher=TeacherChoice(str(places["gpt2"])))
    with pytest.raises(Error, match="teacher_fingerprint was"):
        train(other)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.filterwarnings("ignore:.*dropout is taken out")
def test_a_foreign_student_is_trained_and_written_whole(
    corpus: Path, places: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    """From its own weights, then the written one, by transformers itself, is what the held-out figures are of."""
    choice = ModelChoice(start=str(places[kind]))
    config = small(corpus, tmp_path / "run", model=choice, teacher=TeacherChoice(str(places["gemma"])), steps=20)
    figures_before = plan(config)
    assert figures_before["parameters"] > 0
    summary = train(config)
    assert figures_before["teacher_flops"] == pytest.approx(summary["teacher_flops"])
    losses = figures(config, "loss")
    assert losses[-1] < 0.9 * losses[0]
    folder = tmp_path / "run" / "model"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    text = (corpus / "text" / "003.txt").read_text()
    tokenizer = Tokenizer.open(corpus / "tokenizer")
    assert AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False).input_ids == tokenizer.encode(text)
    from gemstill.train.heldout import evaluate

    heldout = TokenDataset.open(corpus / "data" / "heldout")
    assert evaluate(Adapter(model), heldout, 32).perplexity == pytest.approx(summary["perplexity"], rel=1e-5)
    card = (folder / "README.md").read_text()
    assert f"It started from the weights of {kind}" in card
    assert type(model).__name__ in card
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == {"llama": 320, "gpt2": 300}[kind]
    assert not list((tmp_path / "run").glob("*.partial"))


def test_a_foreign_shape_from_scratch_and_a_resumed_one(
    corpus: Path, places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choice = ModelChoice(like=str(places["llama"]))
    config = small(corpus, tmp_path / "run", model=choice)
    train(config)
    half = dataclasses.replace(config, run=str(tmp_path / "half"))
    begin(half, stop=6, monkeypatch=monkeypatch)
    train(half)
    assert figures(half, "loss") == figures(config, "loss")
    one, two = ((tmp_path / run / "model" / "model.safetensors").read_bytes() for run in ("run", "half"))
    assert one == two
    assert json.loads((tmp_path / "run" / "model" / "config.json").read_text())["vocab_size"] == VOCAB
    ours = small(corpus, tmp_path / "ours", model=ModelChoice(like=str(places["gemma"])), steps=2)
    train(ours)
    assert (tmp_path / "ours" / "model" / "tokenizer.model").exists()


@pytest.mark.slow
def test_a_foreign_student_on_two_ranks_is_the_one_on_one(
    corpus: Path, places: dict[str, Path], tmp_path: Path
) -> None:
    choice, teacher = ModelChoice(start=str(places["llama"])), TeacherChoice(str(places["gemma"]))
    one = small(corpus, tmp_path / "one", model=choice, teacher=teacher, micro_windows=1)
    train(one)
    two = dataclasses.replace(one, run=str(tmp_path / "two"))
    torchrun(two, tmp_path)
    np.testing.assert_allclose(figures(two, "loss"), figures(one, "loss"), rtol=1e-4)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "two" / "model").config.model_type == "llama"


def test_muon_moves_the_blocks_matrices_alone(corpus: Path, places: dict[str, Path], tmp_path: Path) -> None:
    """GPT-2 calls its embeddings wte and wpe: by their names they would pass for matrices of the blocks."""
    still = OptimizerConfig(learning_rate=1e-9, embedding_rate=0.01, weight_decay=0.0)
    config = small(corpus, tmp_path / "run", model=ModelChoice(start=str(places["gpt2"])), optimizer=still, steps=3)
    train(config)
    before, after = (
        AutoModelForCausalLM.from_pretrained(place).state_dict()
        for place in (places["gpt2"], tmp_path / "run" / "model")
    )
    moved = {name for name in before if float((before[name] - after[name]).abs().max()) > 1e-3}
    assert {"transformer.wte.weight", "transformer.wpe.weight"} <= moved
    assert not any(name.endswith(("c_attn.weight", "c_fc.weight", "c_proj.weight")) for name in moved)


def test_a_recipe_without_a_teacher_is_what_it_was(recipe: TrainConfig) -> None:
    """Runs that were begun before there were teachers go on."""
    assert not [key for key in identity(recipe) if key.startswith(("teacher.", "model.like"))]
    with_one = dataclasses.replace(recipe, teacher=TeacherChoice("somewhere"))
    assert {key for key in identity(with_one) if key.startswith("teacher.")} >= {"teacher.temperature"}
    assert "teacher.source" not in identity(with_one)


def test_what_does_not_fit_is_refused(corpus: Path, places: dict[str, Path], tmp_path: Path) -> None:
    config = small(corpus, tmp_path / "run", teacher=TeacherChoice(str(places["gemma"])))
    source = SourceConfig(str(corpus / "data"), store="somewhere")
    with pytest.raises(Error, match="a teacher and a source has a store"):
        dataclasses.replace(config, data=dataclasses.replace(config.data, sources=[source]))
    with pytest.raises(Error, match="both start and like"):
        ModelChoice(start="a", like="b")
    with pytest.raises(Error, match="comes from 'like'"):
        ModelChoice(like="b", overrides={"num_layers": 3})
    with pytest.raises(Error, match="beta is 1"):
        TeacherChoice("a", divergence="jensen-shannon", beta=1.0)
    with pytest.raises(Error, match="likeliest entries alone, which bias the reverse"):
        TeacherChoice("http://localhost:1/v1", divergence="reverse")
    with pytest.raises(Error, match="temperature is 0"):
        TeacherChoice("a", temperature=0)


def test_a_teacher_of_another_tokenizer_is_refused_and_both_named(corpus: Path, tmp_path: Path) -> None:
    from gemstill.text.training import train_tokenizer

    other = train_tokenizer([Path(__file__).read_text()], tmp_path / "tokenizer", 400)
    save(gemma(400), other, tmp_path / "teacher")
    config = small(corpus, tmp_path / "run", teacher=TeacherChoice(str(tmp_path / "teacher")))
    with pytest.raises(Error, match=f"tokenizer is {other.fingerprint[:16]}"):
        train(config)


def test_a_teacher_that_gives_nan_stops_the_run_with_the_batch_named(
    corpus: Path, places: dict[str, Path], tmp_path: Path
) -> None:
    broken = gemma()
    with torch.no_grad():
        broken.norm.weight.fill_(float("nan"))
    save(broken, Tokenizer.open(corpus / "tokenizer"), tmp_path / "broken")
    config = small(corpus, tmp_path / "run", teacher=TeacherChoice(str(tmp_path / "broken")))
    with pytest.raises(Error, match=r"loss is nan .*step 1, windows that start at tokens"):
        train(config)
    assert not (tmp_path / "run" / "model").exists()


def test_a_loss_by_drawn_columns_goes_on_where_it_was(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The draws follow from seed, step and windows; they learn what all columns do."""
    monkeypatch.setattr(columns, "NOISE", 0.1)  # or a vocabulary of 300 is done whole
    monkeypatch.setattr(columns, "WORTH", 1.0)
    run, again, exact = (
        small(corpus, tmp_path / name, backward=how)
        for name, how in (("run", "sampled"), ("again", "sampled"), ("exact", "exact"))
    )
    train(run)
    begin(again, stop=6, monkeypatch=monkeypatch)
    train(again)
    train(exact)
    assert figures(again, "loss") == figures(run, "loss")
    assert figures(run, "loss") != figures(exact, "loss")
    assert figures(run, "loss")[-1] == pytest.approx(figures(exact, "loss")[-1], rel=0.06)
