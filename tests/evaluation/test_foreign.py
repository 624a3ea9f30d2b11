"""Models of `transformers` on lm-eval's tasks: the answers of lm-eval's own `hf` backend, in our run."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import gemstill
from gemstill import cli
from gemstill.checkpoint.foreign import library_tokenizer, load_foreign
from gemstill.core import machine
from gemstill.core.errors import Error
from gemstill.evaluation.folder import ANSWERS, RESULTS
from gemstill.evaluation.foreign import ForeignAdapter
from gemstill.evaluation.memorization import ANSWER, PROMPT
from gemstill.evaluation.perplexity import Text, score
from gemstill.text.tokenizer import Tokenizer
from gemstill.text.training import train_tokenizer
from tests.checkpoint.conftest import place, smollm2
from tests.evaluation.requests import hf, instances
from tests.evaluation.roots import write_root
from tests.evaluation.test_adapter import agree, pairs, quick
from tests.evaluation.test_memorization import dataset

__all__ = ["place", "smollm2"]  # fixtures
pytestmark = pytest.mark.filterwarnings("ignore::gemstill.core.notices.Notice")
CONTEXT, VOCAB = 48, 600
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
UGLY = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
MESSAGES = [
    {"role": "user", "content": " What is 東京? "},
    {"role": "assistant", "content": "straße"},
    {"role": "user", "content": "width\n"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama in its folder, with a chat template."""
    place = tmp_path_factory.mktemp("foreign") / "llama"
    torch.manual_seed(0)
    tokenizer = train_tokenizer([Path(__file__).read_text()], place, VOCAB)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_id, bos_token_id=tokenizer.bos_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # so that some continuations are much likelier than others
    model.save_pretrained(place)
    tokenizer.save(place)
    (place / "chat_template.jinja").write_text(CHATML)
    return place


@pytest.fixture(scope="module")
def both(folder: Path) -> tuple[ForeignAdapter, Any]:
    model, tokenizer = load_foreign(folder, dtype=torch.float32)
    ours = ForeignAdapter(model, tokenizer, context=CONTEXT, batch_tokens=40)
    return ours, hf(folder, max_length=CONTEXT, batch_size=8)


@quick
@given(asked=pairs())
def test_log_likelihoods_and_greedy_flags(both, asked):
    agree(both, asked)


def test_rolling_and_generations_are_told_as_they_come(both):
    how = {"until": ["a", "\n"], "max_gen_toks": 12, "do_sample": False}
    for method, asked in (
        ("loglikelihood", [("def area", " b"), ("", "c"), ("def area", " d")]),
        ("loglikelihood_rolling", [("straße " * 30,), ("a",)]),
        ("generate_until", [("def area", how), ("é " * 60, how), ("東", how)]),
    ):
        told: list[Any] = []
        hook = type("Hook", (), {"add_partial": lambda _, *each, told=told: told.append(each)})()
        both[0].set_cache_hook(hook)
        answers, expected = (getattr(backend, method)(instances(method, asked)) for backend in both)
        if method == "generate_until":
            assert answers == expected
        else:
            assert torch.tensor(answers).flatten() == pytest.approx(torch.tensor(expected).flatten(), abs=1e-3)
        assert sorted(told, key=repr) == sorted(zip([method] * 3, asked, answers, strict=False), key=repr)


def test_chats_are_laid_out_as_transformers_does(both):
    ours, theirs = both
    for messages, prompt in ((MESSAGES[:1], True), (MESSAGES, True), (MESSAGES[:2], False)):
        laid_out = ours.apply_chat_template(messages, add_generation_prompt=prompt)
        assert laid_out == theirs.apply_chat_template(messages, add_generation_prompt=prompt)
        assert ours.tok_encode(laid_out) == theirs.tok_encode(laid_out)


def test_what_is_too_long_is_counted_or_refused(both):
    ours = both[0]
    before, long = ours.truncated, "é " * 60
    ours.loglikelihood(instances("loglikelihood", [(long, "a"), ("a", "b")]))
    ours.generate_until(instances("generate_until", [(long, {"max_gen_toks": 2}), ("a", {"max_gen_toks": 2})]))
    assert ours.truncated == before + 2
    with pytest.raises(Error, match="leaves a context of 48 tokens no room"):
        ours.generate_until(instances("generate_until", [("a", {"max_gen_toks": 48})]))


Capture = pytest.CaptureFixture[str]


def answered(capsys: Capture, *words: object, status: int = 0) -> str:
    assert cli.main(["eval", *map(str, words)]) == status
    out, err = capsys.readouterr()
    return out if not status else err.strip().splitlines()[-1]


def test_a_whole_run_resumed(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    root, out = write_root(tmp_path / "root"), tmp_path / "out"
    words = [folder, "--tasks", "piqa,gsm8k,wikitext", "--data-root", root, "--out", out, "--limit", 3]
    turned = [*words, "--shots", 1, "--turns", "true"]
    assert "requests                    12" in answered(capsys, *turned, "--dry-run")
    printed = answered(capsys, *turned)
    saved = json.loads((out / RESULTS).read_text())
    assert f"{saved['results']['piqa']['acc,none']:.4f}" in printed
    item = json.loads((out / "samples" / "piqa.jsonl").read_text().splitlines()[0])
    context = item["arguments"][0][0]
    assert context.count("<|im_start|>user\n") == 2
    assert context.endswith("<|im_start|>assistant\n")
    before = (out / ANSWERS).read_bytes()
    assert answered(capsys, *turned) == printed
    assert (out / ANSWERS).read_bytes() == before
    assert "only Gemma's networks are quantized here" in answered(capsys, *words, "--quantize", "int8", status=2)


def test_answers_to_texts_begun_or_written_otherwise_are_not_gone_on_from(
    folder: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was cut, and settings beside the same weights and the same tokenizer.json changed before the next."""
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(folder, model)
    words = [model, "--tasks", "piqa,gsm8k", "--data-root", write_root(tmp_path / "root"), "--out", out, "--limit", 2]
    with monkeypatch.context() as patch:
        patch.setattr(ForeignAdapter, "generate_until", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        answered(capsys, *words, status=130)
    kept = (out / ANSWERS).read_bytes()
    assert kept.count(b"\n") == 5  # two items of two choices
    plain = json.loads((model / "tokenizer_config.json").read_text())
    for name, changes in (
        ("tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer"}),  # a space before a text
        ("tokenizer_config.json", {"bos_token": plain["eos_token"]}),
        ("tokenizer_config.json", {"clean_up_tokenization_spaces": True, UGLY: True}),
        ("generation_config.json", {"repetition_penalty": 1.3}),
    ):
        before = (model / name).read_bytes()
        (model / name).write_text(json.dumps(json.loads(before) | changes))
        assert "holds the answers of another model" in answered(capsys, *words, status=2), changes
        (model / name).write_bytes(before)
    assert (out / ANSWERS).read_bytes() == kept
    answered(capsys, *words)
    assert (out / ANSWERS).read_bytes().startswith(kept)


def test_perplexity_of_a_folder_of_text(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "text.txt").write_text("def area(width, height):\n    return width * height\n" * 40)
    words = ["perplexity", folder, tmp_path / "text.txt", "--context", 64, "--out", tmp_path / "figures.json"]
    answered(capsys, *words)
    figures = json.loads((tmp_path / "figures.json").read_text())
    model, tokenizer = load_foreign(folder)
    ids = tokenizer.encode((tmp_path / "text.txt").read_text())
    known = score(model, tokenizer, [Text("text", torch.tensor(ids).int().numpy(), 1)], context=64)
    assert figures["nll_per_token"] == pytest.approx(known.nll_per_token)
    assert figures["tokens"] == len(ids)


@pytest.mark.parametrize("marked", [True, False])
def test_what_it_writes_down_again(
    folder: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, marked: bool
) -> None:
    """Of text that the model writes itself, word by word, behind what its own tokenizer puts before a text."""
    monkeypatch.setattr(machine, "fast_dtype", lambda device="cpu": torch.float32)
    place = tmp_path / "model"
    shutil.copytree(folder, place)
    if not marked:
        described = json.loads((place / "tokenizer.json").read_text())
        (place / "tokenizer.json").write_text(json.dumps(described | {"post_processor": None}))
    model, tokenizer = load_foreign(place)
    start = [tokenizer.bos_id] * marked
    documents = []
    for number in range(3):
        row = [*start, *torch.randint(270, VOCAB, (PROMPT,), generator=torch.Generator().manual_seed(number)).tolist()]
        with torch.no_grad():
            for _ in range(ANSWER):
                row.append(int(model(torch.tensor([row]))[0, -1].argmax()))
        for change in range((0, 5, 6)[number]):
            row[-1 - 7 * change] = row[-1 - 7 * change] % (VOCAB - 1) + 1
        documents.append(row[len(start) :])
    dataset(tmp_path / "data", documents, words=tokenizer)
    words = ["memorization", place, "--data", tmp_path / "data", "--out", tmp_path / "out"]
    printed = answered(capsys, *words)
    assert "1 of 3" in printed
    assert "2 of 3" in printed
    lines = [json.loads(line) for line in (tmp_path / "out" / "memorized.jsonl").read_text().splitlines()]
    assert [(line["start"], line["distance"]) for line in lines] == [(1, 0), (103, 5)]
    kept = (tmp_path / "out" / ANSWERS).read_bytes()
    assert answered(capsys, *words) == printed
    assert (tmp_path / "out" / ANSWERS).read_bytes() == kept


def test_a_context_shorter_than_a_window_is_refused(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    place = tmp_path / "model"
    shutil.copytree(folder, place)
    described = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(described | {"max_position_embeddings": 100}))
    dataset(tmp_path / "data", [[300] * (PROMPT + ANSWER)], words=Tokenizer.open(place))
    words = ["memorization", place, "--data", tmp_path / "data", "--out", tmp_path / "out"]
    assert "before it have 101 tokens, the model reads 100" in answered(capsys, *words, status=2)


def test_a_tokenizer_without_settings_is_made_of_what_ours_knows(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    bare = Tokenizer.open(tmp_path)
    theirs = library_tokenizer(bare)
    assert theirs.encode("def area 東京", add_special_tokens=False) == bare.encode("def area 東京")
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.chat_template) == (bare.bos_id, bare.eos_id, None)
    model = load_foreign(folder)[0]
    with pytest.raises(Error, match=r"LlamaForCausalLM: has no chat template, so it is not asked in turns"):
        gemstill.evaluate(model, bare, ["piqa"], turns=True)


def test_what_is_for_gemma_alone_is_said(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "policies").mkdir()
    words = ["policies", folder, "--judge", "http://localhost:1/v1#judge", "--out", tmp_path / "policies"]
    assert "llama" in answered(capsys, *words, status=2)


@pytest.mark.real_weights
def test_smollm2_writes_down_again_what_everybody_knows(smollm2: Path, tmp_path: Path, capsys: Capture) -> None:
    """Numbers are counted on for ever, words drawn at random are not."""
    tokenizer = load_foreign(smollm2)[1]
    draw = random.Random(0)
    known = " ".join(f"{number}," for number in range(1, 80))
    drawn = " ".join(draw.choice(Path(__file__).read_text().split()) for _ in range(150))
    for name, text in (("known", known), ("drawn", drawn)):
        dataset(tmp_path / name, [tokenizer.encode(text)], name, words=tokenizer)
    words = ["memorization", smollm2, "--data", tmp_path / "known", "--data", tmp_path / "drawn"]
    answered(capsys, *words, "--out", tmp_path / "out", "--samples", 40)
    rates = json.loads((tmp_path / "out" / RESULTS).read_text())["by_source"]
    print({name: rate["exact"] for name, rate in rates.items()})
    assert rates["known"]["exact"]["share"] > 0.5
    assert rates["drawn"]["approximate"]["share"] == 0


@pytest.mark.real_weights
def test_smollm2_135m_item_for_item(smollm2: Path) -> None:
    """The file that `teach` takes too, in float32: what `hf` says with the model that transformers reads from it."""
    model, tokenizer = load_foreign(smollm2, dtype=torch.float32)
    ours = ForeignAdapter(model, tokenizer, context=256)
    known = AutoModelForCausalLM.from_pretrained(smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32)
    theirs = ForeignAdapter.__mro__[2](  # HFLM itself
        known.eval(), tokenizer=AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name), max_length=256
    )
    asked = [(f"The capital of {country} is", f" {city}") for country, city in
             (("France", "Paris"), ("Italy", "Rome"), ("Italy", "Berlin"), ("Japan", "Tokyo, of course"))]  # fmt: skip
    found, expected = (backend.loglikelihood(instances("loglikelihood", asked)) for backend in (ours, theirs))
    for (logprob, greedy), (other, flag) in zip(found, expected, strict=True):
        assert logprob == pytest.approx(other, abs=1e-3)
        assert greedy == flag
    assert found[1][0] > found[2][0]
    how = {"until": ["\n\n"], "max_gen_toks": 16, "do_sample": False}
    prompts = [(ours.apply_chat_template([{"role": "user", "content": "What is the capital of France?"}]), how)]
    assert prompts[0][0] == theirs.apply_chat_template([{"role": "user", "content": "What is the capital of France?"}])
    written = [backend.generate_until(instances("generate_until", prompts)) for backend in (ours, theirs)]
    assert written[0] == written[1]
    assert "Paris" in written[0][0]
