"""Mutations of PyTorch's own file: a zip archive of a pickle, which may be a program, and of tensors' bytes."""

from __future__ import annotations

import io
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable
from random import Random

from fuzz import raw, trees

Archive = dict[str, bytes]
PROGRAMS = (  # what `pickle.load` would run
    b"cos\nsystem\n(S'touch outside'\ntR.", b"cbuiltins\neval\n(S'open(\"outside\", \"w\")'\ntR.",
    b"cposix\nsystem\n(S'touch outside'\ntR.", b"csubprocess\nPopen\n((lS'touch'\naS'outside'\natR.",
    b"ctorch\nload\n(S'outside'\ntR.", b"cbuiltins\nopen\n(S'outside'\nS'w'\ntR.", b"cshutil\nrmtree\n(S'..'\ntR.",
    b"c__builtin__\nbytearray\n(I9999999999\ntR.", b"cbuiltins\nbytearray\n(I9999999999\ntR.",
    b"ctorch\nzeros\n(I9999999999\ntR.", b"ccollections\nOrderedDict\n(I1\ntR.", b"ctorch.nn\nModule\n)R.",
    b"ctorch._utils\n_rebuild_tensor_v2\n)R.", b"(" * 100_000 + b".", b"]" * 100_000 + b".", b"\x80\x02]q\0h\0a.",
    b"(dp0\nS'model_state_dict'\nh\0s.", b"\x80\x02" + b"]q\0(" + b"h\0" * 9 + b"e.",
    b"N.", b"I1\n.", b"}.", b"0.", b"R.",     b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.",
    b"\x80\x02\x8b\xff\xff\xff\x7f.", b"X\xff\xff\xff\x7f.", b"P../x\n.",
)  # fmt: skip


def unpack(data: bytes) -> Archive:
    """The archive's members by name. Raises ValueError for what is no archive."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return {name: archive.read(name) for name in archive.namelist()}
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError) as error:
        raise ValueError("is no archive") from error


def pack(members: Archive, *, compress: bool = False) -> bytes:
    """The archive again, its checksums true; dated like no day, so that equal members make equal bytes."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content, archive.compression)
    return out.getvalue()


def _pickle(change: Callable[[Random, bytes], bytes]) -> Callable[[Random, bytes], bytes]:
    """A mutator of the file from one of its pickle, all else left whole."""

    def mutate(rng: Random, data: bytes) -> bytes:
        members = unpack(data)
        name = next(name for name in members if name.endswith("data.pkl"))
        members[name] = change(rng, members[name])
        return pack(members)

    mutate.__name__, mutate.__doc__ = change.__name__.strip("_"), change.__doc__
    return mutate


def _program(rng: Random, pickle: bytes) -> bytes:
    """The pickle is a program, alone or before the rest."""
    program = rng.choice(PROGRAMS)
    return rng.choice((program, pickle[:2] + program.rstrip(b".").removeprefix(b"\x80\x02") + b"0" + pickle[2:]))


def _number(rng: Random, pickle: bytes) -> bytes:
    """A number of the pickle, a size, stride, offset or count, is one of the edges."""
    ops = [(op, at) for op, arg, at in pickletools.genops(pickle) if op.name in ("BININT", "BININT1", "BININT2")]
    op, at = rng.choice(ops)
    width = {"BININT": 4, "BININT1": 1, "BININT2": 2}[op.name]
    value = rng.choice((*raw.EDGES, -1, -(2**31), -(2**63)))
    wide = value.to_bytes(9, "little", signed=True)
    return pickle[:at] + b"\x8a\x09" + wide + pickle[at + 1 + width :]


def _name(rng: Random, pickle: bytes) -> bytes:
    """A text of the pickle, a tensor's name, a storage's key or a class, is another."""
    found = [(arg, at) for op, arg, at in pickletools.genops(pickle) if op.name == "BINUNICODE"]
    text, at = rng.choice(found)
    old = len(text.encode()) + 5
    new = rng.choice((*trees.TEXTS, rng.choice(found)[0])).encode(errors="surrogatepass")
    return pickle[:at] + b"X" + struct.pack("<I", len(new)) + new + pickle[at + old :]


def _opcode(rng: Random, pickle: bytes) -> bytes:
    """One instruction is another."""
    at = rng.choice([at for _, _, at in pickletools.genops(pickle)])
    return (
        pickle[:at] + rng.choice("()].}0N1Q2RtsbcueKMJ\x85\x86\x87\x88\x89\x93\x94").encode("latin1") + pickle[at + 1 :]
    )


def _bytes(rng: Random, pickle: bytes) -> bytes:
    """Any bytes of the pickle."""
    return rng.choice(raw.MUTATORS)(rng, pickle)


def members_changed(rng: Random, data: bytes) -> bytes:
    """A member is away, shorter, longer, under another name, or says something else of the byte order."""
    members = unpack(data)
    name = rng.choice(list(members))
    content = members.pop(name)
    change = rng.randrange(5)
    if change == 1:
        members[name] = rng.choice(raw.MUTATORS)(rng, content)
    elif change == 2:
        members[name.replace("/", rng.choice(("/../", "/..\\", "//", "")), 1)] = content
    elif change == 3:
        members[name] = content
        members |= {f"{name.split('/')[0]}/data/{n}": b"" for n in range(1000, 1000 + rng.choice((1, 20_000)))}
    elif change == 4:
        top = name.split("/")[0]
        members[name] = content
        members[f"{top}/byteorder"] = rng.choice((b"big", b"", b"\xff", b"little" * 999))
        members[f"{top}/.format_version"] = rng.choice((b"1", b"99", b""))
        members[f"{top}/version"] = rng.choice((b"3", b"99999999999999999999", b"x"))
    return pack(members)


def bomb(rng: Random, data: bytes) -> bytes:
    """A member of zeros packed a thousand times smaller than it is."""
    members = unpack(data)
    name = rng.choice(list(members))
    members[name] = members[name] + bytes(rng.choice((2**20, 2**26, 2**29)))
    return pack(members, compress=True)


def directory(rng: Random, data: bytes) -> bytes:
    """A size or an offset of the archive's own directory, at its end, is one of the edges."""
    at = rng.choice([data.rfind(b"PK\5\6"), data.find(b"PK\1\2"), data.rfind(b"PK\1\2"), 0])
    start, width = at + rng.randrange(4, 46), rng.choice((2, 4, 8))
    return data[:start] + raw.edge(rng, width) + data[start + width :]


def bare(rng: Random, data: bytes) -> bytes:
    """No archive but a pickle alone, as before PyTorch 1.6."""
    magic = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.\x80\x02}q\0."
    return rng.choice((b"", magic)) + rng.choice(PROGRAMS)


MUTATORS = (
    _pickle(_program), _pickle(_program), _pickle(_number), _pickle(_number), _pickle(_number), _pickle(_name),
    _pickle(_opcode), _pickle(_bytes), members_changed, bomb, directory, bare,
)  # fmt: skip
