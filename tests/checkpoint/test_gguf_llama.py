"""llama.cpp loads our GGUF files, gives the same ids, and the same next-token distributions.

Distributions are compared over real text as the mean Kullback-Leibler divergence from our own float32, with a
float32 cache there. llama.cpp rounds activations to the weights' format, so what remains grows with the format.
"""

from __future__ import annotations

import ctypes
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from gemstill.checkpoint.gguf import save_gguf
from gemstill.model.config import ModelConfig
from gemstill.text.tokenizer import Tokenizer
from gemstill.text.training import train_tokenizer
from gemstill.text.words import SPACE
from tests.checkpoint.gguf_models import BOTH, GEMMA2, library, network
from tests.model.tokenizers import TEXT, small_tokenizer
from tests.text import texts

llama_cpp = pytest.importorskip("llama_cpp")
BARS = {"f32": 1e-5, "f16": 1e-4, "bf16": 1e-3, "q8_0": 5e-3}
WINDOW = 256  # tokens, several times the windows of the local layers


def open_llama(path: Path, context: int = WINDOW, *, threads: int = 1, **more):
    """The file in llama.cpp, keys and values in float32."""
    silent = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    open_llama.silent = silent  # it must outlive the call
    sizes = dict.fromkeys(("n_ctx", "n_batch", "n_ubatch"), context)
    kinds = dict.fromkeys(("type_k", "type_v"), llama_cpp.GGML_TYPE_F32)
    counts = dict.fromkeys(("n_threads", "n_threads_batch"), threads)
    return llama_cpp.Llama(str(path), **(sizes | kinds | counts | more), verbose=False)


def scores(llama, row: list[int]) -> Tensor:
    """llama.cpp's logits [T, V] float32 after each token of `row`."""
    llama.reset()
    llama.eval(row)
    return torch.from_numpy(np.array(llama.scores[: len(row)], np.float32))


def divergences(config: ModelConfig, tokenizer: Tokenizer, rows: list[list[int]], kind: str, folder: Path) -> Tensor:
    """KL(ours float32 ‖ llama.cpp) at each position of `rows`, for weights saved as `kind`."""
    model = network(config, rough=kind == "f32")
    save_gguf(model, tokenizer, folder / "model.gguf", dtype=kind)
    llama = open_llama(folder / "model.gguf", logits_all=True)
    found = []
    for row in rows:
        with torch.no_grad():
            mine = torch.log_softmax(model(torch.tensor([row]))[0].double(), -1)
        found.append((mine.exp() * (mine - torch.log_softmax(scores(llama, row).double(), -1))).sum(-1))
    return torch.cat(found)


def windows(tokenizer: Tokenizer, text: str, count: int) -> list[list[int]]:
    ids, width = tokenizer.encode(text), WINDOW - 1
    rows = [[tokenizer.bos_id, *ids[start : start + width]] for start in range(0, len(ids), width)]
    assert len(rows[count - 1]) == WINDOW
    return rows[:count]


@pytest.mark.filterwarnings("ignore:.*rounds activations")
@pytest.mark.parametrize("kind", BARS)
@pytest.mark.parametrize("name", BOTH)
def test_same_distributions(name: str, kind: str, tmp_path: Path) -> None:
    tokenizer = small_tokenizer()
    rows = windows(tokenizer, "".join(TEXT), 2)
    found = divergences(BOTH[name], tokenizer, rows, kind, tmp_path)
    assert float(found.mean()) <= BARS[kind]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*rounds activations")
@pytest.mark.parametrize("kind", BARS)
@pytest.mark.parametrize("name", BOTH)
def test_same_distributions_over_2000_positions(name: str, kind: str, tmp_path: Path) -> None:
    """Two kilotokens of Python's library; run with -s to see the divergences."""
    source = library("argparse.py", "textwrap.py")
    tokenizer = train_tokenizer(source, tmp_path / "tokenizer", 1024)
    config = replace(BOTH[name], vocab_size=1024, hidden_size=128, intermediate_size=384)
    found = divergences(config, tokenizer, windows(tokenizer, "".join(source), 9), kind, tmp_path)
    assert len(found) >= 2000
    print(f"\n{name} {kind}: mean KL {found.mean():.2e}, largest {found.max():.2e}, {len(found)} positions")
    assert float(found.mean()) <= BARS[kind]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    save_gguf(network(GEMMA2), small_tokenizer(), path, dtype="q8_0")
    return open_llama(path, 512, vocab_only=True)


NASTY = [
    *TEXT[:3], *texts.PARTS, *texts.CONTROL, "", " ", "    x", "\t\t\n\n\n\n", "0123456789", "a\u0301\u0378\U000e0001",
    "👩‍👩‍👧🙂", "<bos><start_of_turn>user\n", "[PAD320]", "\x00\x7f", "東京 straße ÅÅ", "e" * 300,
]  # fmt: skip


# llama.cpp, as SentencePiece, cannot tell U+2581 from a space.
@pytest.mark.parametrize("text", [text for text in NASTY if SPACE not in text])
def test_same_ids(vocabulary, text: str) -> None:
    assert vocabulary.tokenize(text.encode(), add_bos=False, special=False) == small_tokenizer().encode(text)


@settings(max_examples=200, deadline=None)
@given(text=texts.comparable | texts.spelled)
def test_same_ids_of_any_text(vocabulary, text: str) -> None:
    if SPACE not in text:
        assert vocabulary.tokenize(text.encode(), add_bos=False, special=False) == small_tokenizer().encode(text)


def test_control_tokens_bos_and_template(vocabulary) -> None:
    tokenizer = small_tokenizer()
    text = "<start_of_turn>user\nhi<end_of_turn>\n"
    ids = vocabulary.tokenize(text.encode(), add_bos=True, special=True)
    assert ids == [tokenizer.bos_id, *tokenizer.encode(text, special=True)]
    assert vocabulary.metadata["tokenizer.chat_template"] == tokenizer.chat_template
    assert (vocabulary.token_bos(), vocabulary.token_eos()) == (tokenizer.bos_id, tokenizer.eos_id)
    assert llama_cpp.llama_vocab_is_eog(vocabulary._model.vocab, tokenizer.token_id("<end_of_turn>"))
