"""`store verify` and `store merge`: what is wrong is named, parts become the store that one process would write."""

import shutil

import pytest

from gemstill import cli
from gemstill.core.errors import Error
from gemstill.distill.block import block_path
from gemstill.distill.command import MergeConfig, VerifyConfig, merge, plan_merge, verify
from gemstill.distill.store import Store
from gemstill.distill.teach import begin, describe, teach_block, teach_model

from .test_teach import Stream, contents, settings, tiny


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A store of three blocks, taught by one process."""
    folder = tmp_path_factory.mktemp("whole") / "store"
    model, stream = tiny(), Stream()
    teach_model(model, stream, folder, describe(model, stream, **settings()))
    return folder


def part(folder, blocks, **changes):
    """A part of it: these blocks, taught elsewhere."""
    model, stream = tiny(), Stream()
    folder.mkdir()
    info = describe(model, stream, **settings(**changes))
    begin(folder, info, stream)
    for block in blocks:
        teach_block(model, stream, folder, info, block)
    return folder


def test_parts_become_the_store_that_one_process_writes(whole, tmp_path):
    parts = [part(tmp_path / "a", [0, 2]), part(tmp_path / "b", [2])]
    target = tmp_path / "merged"
    config = MergeConfig(tuple(map(str, parts)), target)
    assert plan_merge(config) == {"blocks": 3, "missing_blocks": 1, "missing": "1"}
    assert not target.exists()
    assert merge(config)["missing_blocks"] == 1
    with pytest.raises(Error, match="not finished"):
        Store.open(target)
    rest = MergeConfig((str(part(tmp_path / "c", [1])),), target)
    assert plan_merge(rest)["missing_blocks"] == 0
    assert merge(rest) == {"blocks": 3, "missing_blocks": 0}
    assert contents(target) == contents(whole)
    assert merge(rest) == {"blocks": 3, "missing_blocks": 0}  # again: nothing is left to do
    assert merge(MergeConfig((str(whole),), tmp_path / "copy"))["missing_blocks"] == 0


def test_the_command_takes_any_number_of_parts(whole, tmp_path, capsys):
    a, b = part(tmp_path / "a", [0]), part(tmp_path / "b", [1, 2])
    assert cli.main(["store", "merge", str(a), str(b), str(tmp_path / "m")]) == 0
    assert contents(tmp_path / "m") == contents(whole)
    assert cli.main(["store", "verify", str(tmp_path / "m")]) == 0
    assert "bytes per token" in capsys.readouterr().out
    assert cli.main(["store", "merge", str(a)]) == 2
    assert "nothing to merge" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "names"),
    [({"seed": 1}, ["seed is 1, there 0"]), ({"estimator": "topk(4)"}, ["estimator is topk(4)", "threshold(0.1)"])],
)
def test_parts_of_other_stores_are_refused_with_the_difference(whole, tmp_path, change, names):
    other = part(tmp_path / "other", [1], **change)
    with pytest.raises(Error) as caught:
        merge(MergeConfig((str(whole), str(other)), tmp_path / "target"))
    assert all(name in str(caught.value) for name in ["other", str(whole), *names])
    assert not (tmp_path / "target").exists()
    with pytest.raises(Error, match="no part of the same store"):
        merge(MergeConfig((str(whole),), other))


def test_blocks_that_differ_or_are_damaged_are_named_and_not_taken(whole, tmp_path):
    a, target = part(tmp_path / "a", [0, 1]), tmp_path / "target"
    good = block_path(a, 1).read_bytes()
    block_path(a, 1).write_bytes(good[:-30])
    with pytest.raises(Error, match="a/data/block-000001"):
        merge(MergeConfig((str(a),), target))
    assert not block_path(target, 1).exists()
    model, stream = tiny(seed=5), Stream()
    info = describe(tiny(), stream, **settings())
    block_path(a, 1).unlink()
    teach_block(model, stream, a, info, 1)  # a machine that computes something else
    with pytest.raises(Error, match=r"block-000001.*other bytes than"):
        merge(MergeConfig((str(whole), str(a)), target))


def test_a_target_of_something_else_is_refused(whole, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(Error, match=r"thesis\.txt"):
        merge(MergeConfig((str(whole),), tmp_path))
    with pytest.raises(Error, match="nothing to merge"):
        MergeConfig((), tmp_path)


def test_verify_names_the_damaged_file(whole, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    assert verify(VerifyConfig(copy))["tokens"] == Stream.num_tokens
    for name in ("data/block-000001.safetensors", "code.safetensors"):
        data = bytearray((whole / name).read_bytes())
        data[-3] ^= 1
        (copy / name).write_bytes(bytes(data))
        with pytest.raises(Error, match=name):
            verify(VerifyConfig(copy))
        (copy / name).write_bytes((whole / name).read_bytes())
    block_path(copy, 2).unlink()
    with pytest.raises(Error, match=r"block-000002.*missing"):
        verify(VerifyConfig(copy))
