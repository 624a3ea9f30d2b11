"""Networks that are not ours: opened and written by `transformers`, behind gemstill.model.adapter.Adapter.

Nothing is unpickled and no code comes with a model: weights are safetensors or GGUF, classes are the library's own.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from gemstill.checkpoint import hub, sidecars, source
from gemstill.checkpoint.hf_config import BOTH, CONFIG, DEFAULTS, MOST_CONFIG, read_limited
from gemstill.checkpoint.huggingface import MARK, SHARD, check_replaceable
from gemstill.checkpoint.look import gguf_architecture, look
from gemstill.core.errors import Error
from gemstill.core.files import write_json, writing
from gemstill.core.notices import note
from gemstill.model.adapter import Adapter, ForeignConfig
from gemstill.model.config import ModelConfig
from gemstill.model.transformer import Transformer
from gemstill.text.tokenizer import Tokenizer

SETTINGS = "tokenizer_config.json"
_INSTALL = "pip install 'gemstill[transformers]'"


def place_of(name: str | Path) -> Path:
    """Where a model of any architecture lies: its folder or file, fetched from the hub when it is a name there.

    Raises:
        Error: there is no such thing, or it is no model.
    """
    found = look(name)
    if found.kind == "hub":
        return hub.resolve(str(name))
    return found.path if found.kind == "folder" or is_foreign(found.path) else source.find(name)


def is_foreign(place: str | Path) -> bool:
    """Whether the folder or file at `place` holds a network of another architecture than ours."""
    path = Path(place).expanduser()
    if path.is_dir() and (path / CONFIG).is_file() and look(path).kind == "folder":
        return _raw_config(path).get("model_type") not in (*DEFAULTS, BOTH)
    if path.is_file() and look(path).kind == "gguf":
        return not gguf_architecture(path).startswith("gemma")
    return False


def open_any(
    place: str | Path,
    *,
    dtype: torch.dtype | None = None,
    quantize: str | None = None,
    device: str | torch.device = "cpu",
) -> tuple[Transformer | Adapter, Tokenizer]:
    """Open a model of any architecture, ours or one of `transformers`, and its tokenizer.

    place: a folder, a GGUF file, Google's own file, or a name on the hub. dtype, quantize: as `gemstill.load` has
    them; a foreign network is stored in the dtype that it computes in, and cannot be quantized.

    Raises:
        Error: as `gemstill.load` and `load_foreign` do.
    """
    path = place_of(place)
    if not is_foreign(path):
        return source.load(path, dtype=dtype, quantize=quantize, device=device)
    if quantize is not None:
        raise Error("only Gemma's networks are quantized here", where=path, fix="leave quantize out")
    return load_foreign(path, dtype=dtype, device=device)


def shape_of(place: str | Path) -> ModelConfig | ForeignConfig:
    """The network that a model has, ours or not, without its weights where that can be. Raises Error as `open_any`."""
    path = place_of(place)
    if not is_foreign(path):
        return source.shape_of(path)
    if path.is_file():  # what `transformers` reads of a GGUF file's fields, it reads with the weights
        return load_foreign(path)[0].config
    with torch.device("meta"):
        return Adapter(_from_config(_config(path))).config


def load_foreign(
    path: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> tuple[Adapter, Tokenizer]:
    """Open the folder or GGUF file of a causal model that `transformers` knows, and its tokenizer, for evaluation.

    dtype: that weights are stored and products taken in; by default this machine's fast precision.

    Raises:
        Error: `transformers` is not installed or does not know the architecture; the model brings code of its own,
            is quantized, or has weights missing; it is no plain causal model (see Adapter).
    """
    path = Path(path)
    dtype = source.compute_dtype(dtype, device) if dtype is None else dtype
    library = _library(path)
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": False, "local_files_only": True}
    with _readable(path):
        if path.is_file():
            options |= {"gguf_file": path.name}
        else:
            options |= {"config": _config(path), "use_safetensors": True}
        folder = path.parent if path.is_file() else path
        model, report = library.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    lost = [*report["missing_keys"], *(str(item[0]) for item in report["mismatched_keys"])]
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    if lost := sorted(set(lost) - tied):
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise Error(f"has no weights for {lost[0]}{more}", where=path, fix="fetch or save it again")
    if path.is_file():  # its blocks are undone by now: what is saved later is plain
        model.hf_quantizer = model.config.quantization_config = None
        del model.config.quantization_config
    adapter = Adapter(model.to(device).eval())
    tokenizer = Tokenizer.open(path) if path.is_dir() else _gguf_tokenizer(path)
    if tokenizer.vocab_size > adapter.config.vocab_size:
        what = f"its tokenizer has {tokenizer.vocab_size} entries, its head {adapter.config.vocab_size}"
        raise Error(what, where=path, fix="put the tokenizer beside it that belongs to it")
    return adapter, tokenizer


def make_foreign(place: str | Path, tokenizer: Tokenizer, *, seed: int = 0) -> Adapter:
    """A network with random weights of the architecture and shape that a folder's config.json describes.

    The weights are drawn by `transformers`, as a function of `seed`. tokenizer: decides the rows of embedding and
    head, and which ids begin and end a text. Dropout is off.

    Raises:
        Error: as `load_foreign`.
    """
    path = place_of(place)
    config = _config(path if path.is_dir() else path.parent)
    config.vocab_size = tokenizer.vocab_size
    for name, number in sidecars.special_ids(tokenizer).items():
        setattr(config, name, number)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Adapter(_from_config(config))


def save_foreign(
    model: Adapter, weights: dict[str, torch.Tensor], tokenizer: Tokenizer, folder: str | Path, *, card: str
) -> None:
    """Write a foreign network as the folder that `transformers` opens, whole or not at all, its tokenizer beside it.

    model: says what it is. weights: its parameters by their names in `model`, whole.

    Raises:
        Error: `folder` holds anything but a checkpoint of ours, or cannot be written.
    """
    folder = Path(folder).resolve()
    check_replaceable(folder)
    named = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    with writing(folder, folder=True) as partial, _quiet():
        model.model.save_pretrained(partial, state_dict=named, max_shard_size=SHARD)
        described = json.loads((partial / CONFIG).read_bytes())
        write_json(partial / CONFIG, described | {MARK: sidecars.version()})
        sidecars.write_tokenizer(partial, tokenizer)
        (partial / "README.md").write_text(card, encoding="utf-8")


def _library(where: Path) -> Any:
    try:
        import transformers
    except ImportError as error:
        what = f"is a network that `transformers` runs, which cannot be imported ({error})"
        raise Error(what, where=where, fix=_INSTALL) from error
    return transformers


def _raw_config(folder: Path) -> dict[str, Any]:
    raw = read_limited(folder / CONFIG, MOST_CONFIG)
    if not isinstance(raw, dict):
        raise Error("is not a JSON object", where=folder / CONFIG)
    return raw


def _config(folder: Path) -> Any:
    """The configuration of a folder's model as `transformers` has it, dropout off."""
    library, raw = _library(folder), _raw_config(folder)
    kind = raw.get("model_type")
    if "auto_map" in raw and kind not in library.CONFIG_MAPPING:
        fix = "take a model of an architecture that transformers has itself"
        raise Error("brings code of its own (auto_map), which is never run", where=folder / CONFIG, fix=fix)
    if "quantization_config" in raw:
        raise Error("is quantized", where=folder / CONFIG, fix="take the model it was made from")
    with _readable(folder):
        config = library.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    rates = [name for name, value in config.to_dict().items() if value and ("dropout" in name or "pdrop" in name)]
    if rates:
        note(f"dropout is taken out ({', '.join(rates)}): no run could be repeated with it", where=folder)
    for name in rates:
        setattr(config, name, 0.0)
    return config


def _from_config(config: Any) -> Any:
    library = _library(Path(config.name_or_path or CONFIG))
    with _readable(config.name_or_path or CONFIG):
        return library.AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)


def _gguf_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a GGUF file, as `transformers` reads it."""
    fast = _fast(path.parent, path, gguf_file=path.name)
    return Tokenizer(fast.backend_tokenizer.to_str().encode(), path, chat_template=fast.chat_template)


def library_tokenizer(tokenizer: Tokenizer) -> Any:
    """The tokenizer of `transformers` from where ours was read: one that knows whether BOS stands before a text.

    Where there are no settings for it beside the file, it is made of what ours knows.

    Raises:
        Error: `transformers` is not installed, or cannot open it.
    """
    place = tokenizer.source
    if place.is_file() and place.suffix not in (".json", ".model"):  # a GGUF file, whatever its name
        return _fast(place.parent, place, gguf_file=place.name)
    if (place.parent / SETTINGS).is_file():
        return _fast(place.parent, place)
    names = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id, "unk": tokenizer.unk_id}
    with _readable(place):
        import tokenizers

        fast = _library(place).PreTrainedTokenizerFast(
            tokenizer_object=tokenizers.Tokenizer.from_str(tokenizer.data.decode()),
            **{f"{name}_token": tokenizer.decode([number]) for name, number in names.items()},
        )
    fast.chat_template = tokenizer.chat_template
    return fast


def beginning(tokenizer: Tokenizer) -> list[int]:
    """The ids that the tokenizer of `transformers` puts before a text: BOS, or none. Raises Error as it is opened."""
    fast = library_tokenizer(tokenizer)
    marked, bare = fast.encode("a"), fast.encode("a", add_special_tokens=False)
    return [int(number) for number in marked[: marked.index(bare[0])]]


def _fast(folder: Path, where: Path, **options: Any) -> Any:
    with _readable(where):
        return _library(where).AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, **options
        )


@contextlib.contextmanager
def _readable(where: object) -> Iterator[None]:
    """`transformers` raises anything: say it in one line."""
    try:
        with _quiet():
            yield
    except (Error, KeyboardInterrupt, MemoryError):
        raise
    except Exception as error:
        text = " ".join(str(error).split())[:300] or type(error).__name__
        raise Error(f"cannot be opened by transformers ({text})", where=where) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Neither progress bars nor advice from `transformers` within."""
    logging: Any = importlib.import_module("transformers.utils.logging")
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # the bar of a GGUF file's blocks asks nobody
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
