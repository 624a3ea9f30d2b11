"""Names of the hub, against a small hub on this machine: what is fetched, what is kept, what is said when it fails.

Each look-up is a process of its own: `huggingface_hub` reads its settings when it is imported.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from gemstill.checkpoint.huggingface import load_folder, save_folder
from gemstill.checkpoint.look import look
from gemstill.model.transformer import Transformer
from gemstill.report.inspect_model import describe_model
from tests.checkpoint.hub import COMMIT, Hub
from tests.model.reference import BASE, roughen
from tests.model.tokenizers import small_tokenizer

NAME = "some-owner/Some.Model-2b"
CODE = """
import sys
from gemstill.checkpoint.hub import resolve
from gemstill.core.errors import Error
try:
    print(resolve(sys.argv[1]))
except Error as error:
    sys.exit(print(error, file=sys.stderr) or 2)
"""
INSPECT = """
import json, sys
from pathlib import Path
from gemstill.checkpoint.look import look
from gemstill.core.errors import Error
from gemstill.report.inspect_model import describe_model
try:
    print(json.dumps(describe_model(look(sys.argv[1]))))
except Error as error:
    sys.exit(print(error, file=sys.stderr) or 2)
"""
LOAD = """
import sys, gemstill
model, tokenizer = gemstill.load(sys.argv[1])
print(float(sum(p.detach().double().sum() for p in model.parameters())), tokenizer.source.parent)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model's folder with things in it that nobody asked for."""
    root = tmp_path_factory.mktemp("hub") / "repository"
    model = Transformer(replace(BASE, vocab_size=320))
    roughen(model)
    save_folder(model, small_tokenizer(), root)
    for name in (
        "pytorch_model.bin",
        "model.ckpt",
        "original/model.safetensors",
        "modeling_evil.py",
        "flax_model.msgpack",
    ):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"not wanted")
    return root


@pytest.fixture
def hub(folder):
    with Hub(NAME, folder).running() as hub:
        yield hub


@pytest.fixture
def ask(hub, tmp_path):
    """Resolve a name in a process whose hub is ours and whose cache is fresh; what it printed, or its Error."""

    def ask(name, code=CODE, **settings):
        given = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"}
        usual = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code, name], env=usual | given | settings, cwd=tmp_path,
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode in (0, 2), done.stderr
        lines = (done.stderr if done.returncode else done.stdout).strip().splitlines()
        return lines[-1]

    return ask


def test_only_what_is_needed_is_fetched_once_and_found_again_without_a_network(ask, hub, folder):
    model, _ = load_folder(folder)
    total, place = ask(NAME, LOAD).split()
    assert float(total) == pytest.approx(float(sum(p.detach().double().sum() for p in model.parameters())), rel=1e-12)
    assert place.endswith(f"snapshots/{COMMIT}")
    wanted = {"config.json", "generation_config.json", "model.safetensors", "README.md"}
    assert wanted | {"tokenizer.json", "tokenizer.model", "tokenizer_config.json"} >= set(hub.fetched) >= wanted
    before, shown = len(hub.fetched), place
    assert ask(f"{NAME}@v1") == shown
    assert ask(f"{NAME}@{COMMIT}") == shown
    assert ask(NAME, HF_HUB_OFFLINE="1") == shown
    assert ask(NAME, HF_ENDPOINT="http://127.0.0.1:9") == shown  # nobody listens there
    assert len(hub.fetched) == before


def test_a_gated_model_is_an_error_with_the_page_to_accept_it_on(ask, hub):
    hub.gated = True
    message = ask(NAME)
    assert message.startswith(f"{NAME}: is given only to those who accept its terms")
    assert f"{hub.url}/{NAME}" in message
    assert "HF_TOKEN" in message
    assert hub.fetched == []
    assert COMMIT in ask(NAME, HF_TOKEN="hf_something")


def test_what_is_not_there_is_said(ask, hub):
    assert "on the hub no such model that you may see" in ask("nobody/nothing")
    assert "has no revision 'v2'; name a branch, tag or commit" in ask(f"{NAME}@v2")
    offline = ask(NAME, HF_HUB_OFFLINE="1")
    assert "no whole copy in the hub's cache, and HF_HUB_OFFLINE is set; unset HF_HUB_OFFLINE" in offline
    unreachable = ask(NAME, HF_ENDPOINT="http://127.0.0.1:9")
    assert "cannot be fetched from http://127.0.0.1:9" in unreachable
    assert hub.fetched == []


@pytest.mark.parametrize("most", [5 * 10**9, 40_000])
def test_inspect_fetches_no_weights(ask, hub, folder, tmp_path, monkeypatch, most):
    """What is said of a model on the hub is what is said of its folder, from the heads of its files alone."""
    monkeypatch.setattr("gemstill.checkpoint.huggingface.SHARD", most)
    hub.folder = tmp_path / "repository"
    save_folder(*load_folder(folder), hub.folder)
    files = len(list(hub.folder.glob("*.safetensors")))
    assert (files > 1) == (most < 10**9)
    found = json.loads(ask(NAME, INSPECT))
    assert found == json.loads(json.dumps(describe_model(look(hub.folder))))
    weights = [name for name in hub.fetched if ".safetensors" in name and "index" not in name]
    assert len(weights) == files
    assert all(name.endswith("in part") for name in weights)
    if files == 1:
        return
    for code in (INSPECT, CODE):  # the cache has no weights, and does not pass for whole
        assert "and HF_HUB_OFFLINE is set; unset HF_HUB_OFFLINE" in ask(NAME, code, HF_HUB_OFFLINE="1")
    assert "cannot be fetched from http://127.0.0.1:9" in ask(NAME, HF_ENDPOINT="http://127.0.0.1:9")
    ask(NAME)
    assert json.loads(ask(NAME, INSPECT, HF_HUB_OFFLINE="1")) == found


def test_inspect_answers_for_what_is_not_there(ask, hub, tmp_path):
    hub.gated = True
    assert "is given only to those who accept its terms" in ask(NAME, INSPECT)
    hub.gated = False
    weights = (hub.folder / "model.safetensors").read_bytes()
    hub.folder = tmp_path / "other"
    hub.folder.mkdir()
    for name in ("config.json", "pytorch_model.bin"):
        (hub.folder / name).write_text("{}")
    assert "has no safetensors; pickled weights are never fetched" in ask(NAME, INSPECT, HF_HOME=str(tmp_path / "b"))
    (hub.folder / "model.safetensors").write_bytes(b"\xff" * 8 + weights[8:])
    assert "cannot be fetched from" in ask(NAME, INSPECT, HF_HOME=str(tmp_path / "c"))


def test_an_interrupted_copy_is_not_taken_for_a_whole_one(ask, hub, tmp_path):
    ask(NAME)
    [weights] = tmp_path.glob("home/**/snapshots/*/model.safetensors")
    weights.unlink()
    message = ask(NAME, HF_HUB_OFFLINE="1")
    assert "no whole copy" in message or "has no safetensors" in message  # older versions of the library
    assert COMMIT in ask(NAME)


def test_a_repository_of_pickles_is_refused_unfetched(ask, hub, tmp_path):
    hub.folder = tmp_path / "pickles"
    hub.folder.mkdir()
    for name in ("config.json", "pytorch_model.bin", "tokenizer.json"):
        (hub.folder / name).write_text("{}")
    assert "has no safetensors; pickled weights are never fetched" in ask(NAME)
    assert "pytorch_model.bin" not in hub.fetched


def test_names_that_lead_out_of_the_cache_are_not_followed(ask, hub, tmp_path):
    hub.extra = ["../../../../../escaped.json", "model-00001-of-/../../../../../../escaped.safetensors"]
    ask(NAME)
    assert not list(tmp_path.rglob("escaped*"))
    assert not list(tmp_path.parent.glob("escaped*"))
