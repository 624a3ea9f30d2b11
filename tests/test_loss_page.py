"""The examples of docs/loss.md run as they stand: bare loop, transformers' Trainer, TRL; each learns."""

import re
from pathlib import Path

import pytest
import torch
import transformers
from torch.nn import functional as F

import gemstill

PAGE = Path(__file__).parents[1] / "docs" / "loss.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.S | re.M)
VOCAB, LENGTH = 97, 12


def example(word):
    """The names that the one example holding `word` defines."""
    names = {}
    exec(next(block for block in BLOCKS if word in block), names)
    return names


def network(seed=0):
    torch.manual_seed(seed)
    shape = transformers.Gemma2Config(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, attn_implementation="eager",
    )  # fmt: skip
    return transformers.Gemma2ForCausalLM(shape)


def rows(count=24, sparse=False):
    tokens = torch.randint(1, VOCAB, (count, LENGTH), generator=torch.Generator().manual_seed(1))
    each = [{"input_ids": row, "labels": row.masked_fill(torch.arange(LENGTH) < 2, -100)} for row in tokens]
    if sparse:
        after = F.pad(tokens[:, 1:], (0, 1))
        ids, probs = torch.stack([after, (after + 1) % VOCAB], -1), torch.tensor([0.75, 0.25]).expand(count, LENGTH, 2)
        each = [row | {"ids": i, "probs": p} for row, i, p in zip(each, ids, probs, strict=True)]
    return each


def settings(folder, kind=transformers.TrainingArguments, **more):
    return kind(
        folder, max_steps=6, per_device_train_batch_size=4, gradient_accumulation_steps=2, learning_rate=1e-3,
        logging_steps=1, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True,
        lr_scheduler_type="constant", **more,
    )  # fmt: skip


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_a_bare_loop():
    step, model = example("def train_step")["train_step"], network()
    tokens = torch.stack([row["input_ids"] for row in rows()])
    weight = (torch.arange(LENGTH) < LENGTH - 1).float().expand(24, -1)
    target = gemstill.Target.hard(F.pad(tokens[:, 1:], (0, 1)), weight)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    found = [step(model, optimizer, tokens, target) for _ in range(6)]
    assert found[0] == pytest.approx(network()(tokens, labels=tokens).loss.item(), rel=1e-4)
    assert found[-1] < found[0] - 0.05


@pytest.mark.parametrize("bf16", [False, True])
def test_transformers_trainer(bf16, tmp_path):
    """On labels its first steps' losses are those of the trainer that it stands in for."""
    fused, found = example("class FusedTrainer")["FusedTrainer"], []
    for kind in (fused, transformers.Trainer):
        trainer = kind(network(), settings(str(tmp_path), bf16=bf16), train_dataset=rows())
        trainer.train()
        found.append(losses(trainer))
    assert found[0] == pytest.approx(found[1], rel=2e-2 if bf16 else 1e-3)


def test_transformers_trainer_from_a_store(tmp_path):
    fused = example("class FusedTrainer")["FusedTrainer"]
    options = settings(str(tmp_path), remove_unused_columns=False)
    trainer = fused(network(), options, train_dataset=rows(sparse=True))
    trainer.train()
    found = losses(trainer)
    assert found[-1] < found[0] - 0.05


def test_trl(tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list([{name: x.tolist() for name, x in row.items()} for row in rows()])
    pad = transformers.PreTrainedTokenizerFast(
        tokenizer_object=__import__("tokenizers").Tokenizer(__import__("tokenizers").models.BPE()), pad_token="<pad>",
        eos_token="<eos>",
    )  # fmt: skip
    options = settings(str(tmp_path), trl.SFTConfig, dataset_kwargs={"skip_prepare_dataset": True})
    trainer = example("class Distiller")["Distiller"](
        network(), options, train_dataset=data, processing_class=pad, teacher=network(seed=1)
    )
    trainer.train()
    found = losses(trainer)
    assert found[-1] < found[0]
