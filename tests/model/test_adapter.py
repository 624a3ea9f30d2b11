"""Models of `transformers` behind our call: packed documents as each alone, the head's every detail, refusals."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertLMHeadModel,
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from gemstill.core.errors import Error
from gemstill.distill.teachers import fingerprint
from gemstill.model.adapter import Adapter
from gemstill.model.readout import Loss
from gemstill.ops.target import Target

VOCAB = 61
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 8,
}  # fmt: skip
GPT2: dict[str, Any] = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
LENGTHS = (5, 1, 1, 9, 4)  # of the documents of a window


def build(kind: str, **changes: Any) -> Any:
    """A small random model, its weights large enough that every detail matters."""
    torch.manual_seed(0)
    model = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, **changes)),
        "tied llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=True)),
        "mistral": lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=3)),
        "gemma2": lambda: Gemma2ForCausalLM(
            Gemma2Config(**SMALL, sliding_window=3, query_pre_attn_scalar=8, attn_logit_softcapping=2.0,
                         final_logit_softcapping=3.0)
        ),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2, **(NO_DROPOUT | changes))),
        "granite": lambda: GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=4.0)),
        "gptj": lambda: GPTJForCausalLM(GPTJConfig(**GPT2, **NO_DROPOUT, rotary_dim=8)),
        "bloom": lambda: BloomForCausalLM(BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4)),
        "bert": lambda: BertLMHeadModel(BertConfig(**{**SMALL, "head_dim": None})),
        "mamba": lambda: MambaForCausalLM(MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2)),
    }[kind]()  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    return model.eval()


def window() -> tuple[Tensor, Tensor]:
    """Two windows of documents, and what document each token is of; the second ends in padding."""
    tokens = torch.randint(0, VOCAB, (2, sum(LENGTHS)), generator=torch.Generator().manual_seed(1))
    owners = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    documents = torch.stack([owners, owners + 7])
    documents[1, -4:] = -1
    return tokens, documents


def alone(model: Any, tokens: Tensor) -> Tensor:
    """The model's own logits of every document of `window()`, run by itself."""
    edges = torch.tensor([0, *LENGTHS]).cumsum(0).tolist()
    rows = [[model(input_ids=row[None, a:b]).logits[0] for a, b in pairwise(edges)] for row in tokens]
    return torch.stack([torch.cat(parts) for parts in rows])


@pytest.mark.parametrize("kind", ["llama", "tied llama", "mistral", "gemma2", "gpt2"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_documents_give_what_each_gives_alone(kind: str, attention: str) -> None:
    model = build(kind)
    if kind != "gemma2":
        model.set_attn_implementation(attention)
    tokens, documents = window()
    with torch.no_grad():
        known, found = alone(model, tokens), Adapter(model)(tokens, documents=documents)
    real = documents >= 0
    assert found.dtype == torch.float32
    torch.testing.assert_close(found[real], known[real], rtol=1e-4, atol=1e-4)
    together = Adapter(model)(tokens)
    assert float((together - found)[:, LENGTHS[0] :].detach().abs().max()) > 0.1  # one document is another matter


@pytest.mark.parametrize("kind", ["tied llama", "gemma2", "gpt2"])
def test_loss_and_gradients_are_those_of_plain_autograd(kind: str) -> None:
    model = build(kind)
    tokens, documents = window()
    labels = tokens.roll(-1, 1)
    weight = (documents >= 0).float()
    plain = torch.nn.functional.cross_entropy(torch.cat(list(alone(model, tokens))), labels.flatten(), reduction="none")
    (plain * weight.flatten()).sum().backward()
    known = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    adapter = Adapter(model)
    adapter.train()
    loss = adapter(tokens, documents=documents, readout=Loss(Target.hard(labels, weight)))
    assert float(loss) == pytest.approx(float((plain * weight.flatten()).sum()), rel=1e-5)
    loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, known[name], rtol=1e-3, atol=1e-3 * float(known[name].abs().max()))


def test_float32_masters_compute_in_bfloat16_and_never_the_other_way() -> None:
    model, (tokens, documents) = build("llama"), window()
    adapter = Adapter(model)
    exact = adapter(tokens, documents=documents)
    own = build("llama").to(torch.bfloat16)
    adapter.compute_dtype = torch.bfloat16
    rounded = adapter(tokens, documents=documents, readout=lambda hidden, head, cap: (hidden.dtype, head.dtype))
    assert rounded == (torch.bfloat16, torch.float32)
    real = documents >= 0
    error = (adapter(tokens, documents=documents) - exact)[real].norm()
    assert error <= 1.5 * (Adapter(own)(tokens, documents=documents) - exact)[real].norm()
    wide = Adapter(own)
    wide.compute_dtype = torch.float32
    with pytest.raises(Error, match="compute in float32, but its weights are bfloat16"):
        wide(tokens)


def test_checkpointing_keeps_the_gradients() -> None:
    tokens, documents = window()
    grads = []
    for wanted in (False, True):
        adapter = Adapter(build("llama"))
        adapter.train()
        adapter.checkpointing = wanted
        assert adapter.checkpointing == wanted
        adapter(tokens, documents=documents, readout=Loss(Target.hard(tokens))).backward()
        grads.append(adapter.head.grad)
    torch.testing.assert_close(grads[0], grads[1])


def test_the_shape_is_counted() -> None:
    model = build("gemma2")
    shape = Adapter(model).config
    assert shape.embedding_parameters == VOCAB * 32
    assert shape.body_parameters + shape.embedding_parameters == sum(p.numel() for p in model.parameters())
    assert [shape.is_local(layer) for layer in range(3)] == [True, False, True]
    assert (shape.family, shape.num_layers, shape.sliding_window) == ("Gemma2ForCausalLM", 3, 3)
    assert len(Adapter(build("gpt2")).layers) == 3


def test_the_fingerprint_is_that_of_shape_and_weights() -> None:
    one, again = Adapter(build("llama")), Adapter(build("llama"))
    assert fingerprint(one) == fingerprint(again)
    with torch.no_grad():
        again.head[3, 3] += 1
    assert fingerprint(one) != fingerprint(again)
    assert fingerprint(one) != fingerprint(Adapter(build("llama", rope_theta=5.0)))


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("bert", "its head has a bias"),
        ("gptj", "its head has a bias"),
        ("bloom", "takes no positions"),
        ("mamba", "takes no positions"),
        ("granite", "more than its head times"),
    ],
)
def test_what_is_no_plain_causal_model_is_refused_with_the_reason(kind: str, why: str) -> None:
    with pytest.raises(Error, match=why):
        Adapter(build(kind))


def test_an_encoder_is_found_by_running_it() -> None:
    model = build("bert")
    model.get_output_embeddings().bias = None
    with pytest.raises(Error, match="depend on tokens that come later"):
        Adapter(model)


def test_dropout_is_refused_for_training_alone() -> None:
    model = build("gpt2", attn_pdrop=0.1)
    adapter = Adapter(model)
    with pytest.raises(Error, match=r"dropout \(transformer.h.0.attn.attn_dropout"):
        adapter.train()
    with pytest.raises(Error, match="dropout"):
        Adapter(build("llama", attention_dropout=0.2).train())


def test_what_is_no_model_and_tokens_of_a_wrong_shape() -> None:
    with pytest.raises(Error, match="no model of transformers"):
        Adapter(torch.nn.Linear(3, 3))
    with pytest.raises(Error, match=r"\[6\] are not"):
        Adapter(build("llama"))(torch.zeros(6, dtype=torch.int64))


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2", "gpt2"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_row_that_is_a_tree_gives_what_each_of_its_paths_gives(kind: str, attention: str) -> None:
    """Two roots, the first with three branches of one beginning; windows of three tokens among the networks."""
    model = build(kind)
    if kind != "gemma2":
        model.set_attn_implementation(attention)
    tokens = torch.randint(0, VOCAB, (1, 16), generator=torch.Generator().manual_seed(2))
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 4, 5, 6, 5, 4, 0, 1, 2, 3]])
    ends = torch.tensor([[12, 12, 12, 12, 7, 7, 7, 11, 10, 10, 11, 12, 16, 16, 16, 16]])
    with torch.no_grad():
        found = Adapter(model)(tokens, branches=(positions, ends))
        for path in (
            [0, 1, 2, 3, 4, 5, 6],
            [0, 1, 2, 3, 7, 8, 9],
            [0, 1, 2, 3, 7, 10],
            [0, 1, 2, 3, 11],
            [12, 13, 14, 15],
        ):
            known = model(input_ids=tokens[:, path]).logits
            torch.testing.assert_close(found[:, path], known, rtol=1e-4, atol=1e-4)
