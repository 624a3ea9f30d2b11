"""Details that other implementations of Gemma 2 got wrong, each as a test that the wrong way fails."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm

from gemstill.core.errors import Error
from gemstill.model import slots
from gemstill.model.config import PRESETS, ModelConfig
from gemstill.model.readout import Loss
from gemstill.model.slots import SlotCache
from gemstill.model.transformer import RMSNorm, Transformer, rotary_angles
from gemstill.ops.attention import attention, make_mask, visible
from gemstill.ops.fused import rotate
from gemstill.ops.target import Target
from tests.model.reference import BASE, ours, text


def counted(tokens: int, start: int = 0):
    return torch.arange(start, start + tokens)[None]


def one_document(tokens: int):
    return torch.zeros(1, tokens, dtype=torch.int64)


def seen(tokens: int, window: int | None):
    """The mask of one document of `tokens` tokens, as rows of 0 and 1."""
    at, document = counted(tokens), one_document(tokens)
    return visible(at, at, document, document, window)[0].int().tolist()


def test_rmsnorm_adds_one_after_widening():
    """In bfloat16 1 + 0.003 is 1: a norm that adds before it widens forgets small weights (litgpt does)."""
    norm, theirs = RMSNorm(8, 1e-6).bfloat16(), Gemma2RMSNorm(8, 1e-6).bfloat16()
    for module in (norm, theirs):
        torch.nn.init.constant_(module.weight, 0.003)
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)).mul(3).bfloat16()
    assert torch.equal(norm(x), theirs(x))
    plain = RMSNorm(8, 1e-6).bfloat16()
    assert not torch.equal(norm(x), plain(x))


def test_rmsnorm_is_computed_in_float32():
    """A gain applied after the cast back rounds twice (transformers#29402)."""
    norm = RMSNorm(64, 1e-6)
    torch.nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(0))
    x = torch.randn(512, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    exact = norm.double()(x.double())
    differ = norm.float()(x) != exact.bfloat16()
    assert differ.float().mean() < 1e-3  # a value that float32 and float64 see on two sides of a tie; not one in four


@pytest.mark.parametrize(("width", "rounded"), [(3072, 55.5), (2304, 48.0), (72, 8.5)])
def test_embedding_scale_rounded_to_compute_dtype(width, rounded):
    """√3072 is 55.4256, but 55.5 in bfloat16, and that is what the weights were trained with."""
    config = replace(BASE, hidden_size=width, num_layers=1, num_heads=1, num_kv_heads=1, vocab_size=5)
    model = Transformer(config, compute_dtype=torch.bfloat16)
    inputs = []
    model.layers[0].register_forward_pre_hook(lambda _, args: inputs.append(args[0][0, 0]))
    model(torch.tensor([[1]]))
    model.compute_dtype = None
    model(torch.tensor([[1]]))
    row = model.embed_tokens.weight[1].detach()
    assert torch.equal(inputs[0], row.bfloat16() * torch.tensor(rounded).bfloat16())
    exactly = (row.bfloat16().float() * math.sqrt(width)).bfloat16()
    assert torch.equal(inputs[0], exactly) == (math.sqrt(width) == rounded)
    torch.testing.assert_close(inputs[1], row * math.sqrt(width))


def test_rotary_angles_in_float32():
    """Position 8191 is 8192 in bfloat16: neighbours far out would be one place."""
    cos, sin = rotary_angles(counted(4, 8188), 16, 10_000.0)
    assert cos.dtype == sin.dtype == torch.float32
    frequencies = 10_000.0 ** (-torch.arange(0, 16, 2).double() / 16)
    angles = torch.arange(8188, 8192).double()[:, None] * frequencies
    torch.testing.assert_close(cos[0, 0].double(), angles.cos(), atol=2e-3, rtol=0)
    torch.testing.assert_close(sin[0, 0].double(), angles.sin(), atol=2e-3, rtol=0)


def test_rotation_depends_on_distance_alone_even_far_out_in_bfloat16():
    x = torch.randn(1, 1, 2, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    products = []
    for start in (0, 8000):
        q, k = rotate(x, rotary_angles(torch.tensor([[start, start + 3]]), 64, 10_000.0)).unbind(2)
        assert q.dtype == torch.bfloat16
        products.append((q.float() * k.float()).sum())
    torch.testing.assert_close(*products, atol=0.15, rtol=0)


def test_query_scale_27b_is_144():
    """√(4608 / 32) = 12, not √128; and 9B's 16, published once as √224 (transformers#31891)."""
    with torch.device("meta"):
        scales = {name: Transformer(PRESETS[name]).layers[0].self_attn.scale for name in PRESETS if "gemma2" in name}
    assert scales == {"gemma2-2b": 1 / 16, "gemma2-9b": 1 / 16, "gemma2-27b": 1 / 12}
    assert PRESETS["gemma2-27b"].head_dim == 128


@pytest.mark.parametrize("softcap", [None, 50.0])
def test_softcap_before_mask(softcap):
    """A cap on masked scores lifts -inf to -50, where the scores of unloved keys are too: the future leaks in."""
    q = torch.full((1, 1, 3, 1, 3), -30.0)
    k = torch.full((1, 1, 3, 3), 30.0)  # every score is far below -50
    v = torch.eye(3)[None, None]
    at, document = counted(3), one_document(3)
    out = attention(q, k, v, make_mask(at, at, document, document, None), softcap=softcap)[0]
    assert out[0].tolist() == [1.0, 0.0, 0.0]
    assert out[1].tolist() == [0.5, 0.5, 0.0]


def test_softcap_is_c_times_tanh_of_x_by_c():
    """x·tanh(x/c) instead gave a first KL of 0.24 (unsloth-zoo#593): the exact values of two scores."""
    q, k = torch.ones(1, 1, 2, 1, 2), torch.tensor([[60.0, 0.0], [0.0, 20.0]])[None, None]
    v = torch.eye(2)[None, None]
    at, document = counted(2), one_document(2)
    out = attention(q, k, v, make_mask(at, at, document, document, None), softcap=50.0)[0, 1]
    difference = 50 * math.tanh(60 / 50) - 50 * math.tanh(20 / 50)
    torch.testing.assert_close(out[0] / out[1], torch.tensor(math.exp(difference)), rtol=1e-4, atol=0)


def test_softcap_in_the_loss():
    """The fused loss of others drops the cap that inference has (apple/ml-cross-entropy#48)."""
    tokens, labels = text(BASE), text(BASE, seed=2)
    loss = ours(BASE)(tokens, readout=Loss(Target.hard(labels.flatten())))
    capped = ours(BASE)(tokens).flatten(0, 1)
    assert capped.abs().max() < 30
    torch.testing.assert_close(loss, F.cross_entropy(capped, labels.flatten(), reduction="sum"), rtol=1e-5, atol=0)
    uncapped = 30 * torch.atanh(capped.double() / 30)
    assert abs(loss - F.cross_entropy(uncapped, labels.flatten(), reduction="sum")) > 1


def test_layer_zero_is_local():
    """Layers 0, 2, 4, … slide and 1, 3, 5, … see all (NVIDIA-NeMo/Speech#9672 had it the other way)."""
    config = PRESETS["gemma2-2b"]
    assert [config.is_local(layer) for layer in range(5)] == [True, False, True, False, True]
    assert [layer.self_attn.window for layer in ours(BASE).layers] == [4, None, 4]
    third = PRESETS["gemma3-270m"]
    assert [layer for layer in range(third.num_layers) if not third.is_local(layer)] == [5, 11, 17]


def test_window_counts_the_query_itself():
    """Window 3: the query and two tokens before it. Kernels that count distance see one more (transformers#39408)."""
    assert seen(5, 3) == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [0, 1, 1, 1, 0],
        [0, 0, 1, 1, 1],
    ]
    assert seen(3, 1) == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert seen(3, None) == seen(3, 3) == seen(3, 99) == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]


def test_mask_of_packed_documents_and_padding():
    positions = torch.tensor([[0, 1, 0, 1, 2, 0]])
    documents = torch.tensor([[0, 0, 1, 1, 1, -1]])
    assert visible(positions, positions, documents, documents, 2)[0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 0],
    ]


def test_mask_of_a_chunk_against_a_ring():
    """Slots of a ring of 3 in the order 3, 4, 2, then the chunk 5, 6: where keys lie says nothing, positions all."""
    queries, keys = torch.tensor([[5, 6]]), torch.tensor([[3, 4, 2, 5, 6]])
    zeros = torch.zeros(1, 5, dtype=torch.int64)
    assert visible(queries, keys, zeros[:, :2], zeros, 3)[0].int().tolist() == [
        [1, 1, 0, 1, 0],
        [0, 1, 0, 1, 1],
    ]


def test_ring_keeps_what_early_queries_of_a_chunk_see(monkeypatch):
    """A ring that stores a chunk before it looks has lost keys that the chunk's first queries need (mlxcel#678)."""
    config = replace(BASE, num_layers=1, sliding_window=4)
    tokens = text(config, 1, 12)
    with torch.no_grad():
        whole = ours(config)(tokens)
        monkeypatch.setattr(slots, "SPARE", 0)
        cache = SlotCache(config, 1, 12)
        assert cache.layers[0].size == 4
        for start, stop in ((0, 3), (3, 8), (8, 12)):
            chunk = ours(config)(tokens[:, start:stop], cache=cache.view(0))
            torch.testing.assert_close(chunk, whole[:, start:stop], atol=1e-4, rtol=0)


def test_global_layers_keep_all_and_local_layers_a_window():
    cache = SlotCache(BASE, 2, 1000)
    local = 4 + slots.SPARE
    assert [layer.size for layer in cache.layers] == [local, 1000, local]
    assert cache.bytes == 2 * 4 * 2 * BASE.num_kv_heads * BASE.head_dim * (local + 1000 + local)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_padding_rows_not_nan(dtype):
    """A row that sees nothing is 0 / 0 in a plain softmax, and its NaN spreads (transformers#32390)."""
    model = Transformer(BASE, compute_dtype=dtype)
    tokens, labels = text(BASE), text(BASE, seed=2)
    documents = torch.full_like(tokens, -1)
    documents[1, 5:] = 0
    assert model(tokens, documents=documents).isfinite().all()
    weight = (documents >= 0).float().flatten()
    model(tokens, documents=documents, readout=Loss(Target.hard(labels.flatten(), weight))).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_left_padding_takes_no_part_in_gradients():
    tokens, labels = text(BASE, 1), text(BASE, 1, seed=2)
    alone, padded = Transformer(BASE), Transformer(BASE)
    alone(tokens, readout=Loss(Target.hard(labels.flatten()))).backward()
    documents = F.pad(torch.zeros_like(tokens), (7, 0), value=-1)
    target = Target.hard(F.pad(labels, (7, 0)).flatten(), (documents >= 0).flatten())
    padded(F.pad(tokens, (7, 0), value=3), documents=documents, readout=Loss(target)).backward()
    for a, b in zip(alone.parameters(), padded.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-4)


def test_initial_weights_are_a_function_of_seed_and_name():
    """Every sharding must start alike: a deeper model begins with the same first layers."""
    short, deep = Transformer(BASE, seed=3), Transformer(replace(BASE, num_layers=5), seed=3)
    for name, parameter in short.named_parameters():
        assert torch.equal(parameter, deep.get_parameter(name)), name
    assert not torch.equal(Transformer(BASE, seed=4).embed_tokens.weight, short.embed_tokens.weight)
    same = [short.layers[0].mlp.gate_proj.weight, short.layers[1].mlp.gate_proj.weight]
    assert not torch.equal(*same)


def test_more_tokens_than_the_cache_holds_are_refused():
    cache = SlotCache(BASE, 1, 4).view(0)
    with pytest.raises(Error, match="cache of 4"):
        ours(BASE)(text(BASE, 1, 5), cache=cache)
    with pytest.raises(Error, match=r"\[batch, time\]"):
        ours(BASE)(torch.tensor([1, 2]))


COUNTS = {  # Gemma 2 report, Table 2: embedding, non-embedding
    "gemma2-2b": (590_118_912, 2_024_517_888),
    "gemma2-9b": (917_962_752, 8_324_201_984),
    "gemma2-27b": (1_180_237_824, 26_047_480_320),
}


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_counts(name):
    """Table 2 to the digit, and the configuration's own count right for every preset."""
    config = ModelConfig.preset(name)
    with torch.device("meta"):
        model = Transformer(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    embedding = model.embed_tokens.weight.numel()
    assert (embedding, total - embedding) == (config.embedding_parameters, config.body_parameters)
    if name in COUNTS:
        assert (embedding, total - embedding) == COUNTS[name]
    if name.startswith("mini-"):
        millions = int(name.removeprefix("mini-").removesuffix("m"))
        assert 0.5 < config.body_parameters / 1e6 / millions < 1.5
        assert config.query_pre_attn_scalar == config.head_dim  # llama.cpp takes it from the number of layers
        assert config.num_layers != 46
        assert not any(size % 32 for size in (config.hidden_size, config.intermediate_size, config.head_dim))


def test_unknown_presets_and_impossible_shapes_are_refused():
    with pytest.raises(Error, match="did you mean 'gemma2-2b'"):
        ModelConfig.preset("gemma-2b")
    for change in ({"num_kv_heads": 3}, {"head_dim": 15}, {"num_layers": 0}, {"final_logit_softcap": -1.0}):
        with pytest.raises(Error):
            replace(BASE, **change)
