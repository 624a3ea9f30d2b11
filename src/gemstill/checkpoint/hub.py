"""Models by their name on the Hugging Face hub: fetched once, kept in its cache, found there without a network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from gemstill.checkpoint.safetensors_file import INDEX, WEIGHTS, Headers, Weights
from gemstill.core.errors import Error

# All that is ever fetched: descriptions, texts and safetensors. Pickled weights are not among them.
_NUMBER = "[0-9]" * 5  # a * would also match a folder
WANTED = (
    "config.json", "generation_config.json", "README.md", "chat_template.jinja",
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    INDEX, WEIGHTS, f"model-{_NUMBER}-of-{_NUMBER}.safetensors",
)  # fmt: skip


def resolve(name: str) -> Path:
    """The local folder of a model of the hub, its files fetched first where they are not in the cache yet.

    name: "owner/name" or "owner/name@revision", a branch, tag or commit. The cache, the token and the offline mode
    are those of `huggingface_hub` (HF_HOME, HF_TOKEN, HF_HUB_OFFLINE). Without a network the cached copy is taken.

    Raises:
        Error: there is no such model or revision, it is private or gated (with the page to accept it on), it has
            no safetensors, the hub cannot be reached and there is no copy, or the disk is full.
    """
    with _asking(name):
        folder = _fetch(name, WANTED)
        if not any(folder.glob("*.safetensors")):
            _heads(name)  # says why: no network, or no such files
            raise _no_safetensors(name)
    return folder


def describe(name: str) -> tuple[Path, Headers]:
    """The local folder of a model of the hub without its weights, and what the heads of its safetensors say of them.

    Where the cache has the weights already, these are asked. Raises Error as `resolve` does.
    """
    with _asking(name):
        folder = _fetch(name, [pattern for pattern in WANTED if not pattern.endswith(".safetensors")])
        if any(folder.glob("*.safetensors")):
            return folder, Weights(folder, None).headers
        return folder, _heads(name)


def _heads(name: str) -> Headers:
    from huggingface_hub import errors, get_safetensors_metadata

    repo, _, revision = name.partition("@")
    try:
        found = get_safetensors_metadata(repo, revision=revision or None).files_metadata
    except errors.NotASafetensorsRepoError as error:
        raise _no_safetensors(name) from error
    tensors = {tensor: (file, info) for file, head in found.items() for tensor, info in head.tensors.items()}
    return Headers(
        {tensor: [int(size) for size in info.shape] for tensor, (_, info) in tensors.items()},
        {tensor: str(info.dtype) for tensor, (_, info) in tensors.items()},
        {tensor: file for tensor, (file, _) in tensors.items()},
    )


def _fetch(name: str, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    repo, _, revision = name.partition("@")
    return Path(snapshot_download(repo, revision=revision or None, allow_patterns=list(patterns)))


def _no_safetensors(name: str) -> Error:
    return Error(
        "has no safetensors", where=name, fix="pickled weights are never fetched; name a repository with safetensors"
    )


@contextmanager
def _asking(name: str) -> Iterator[None]:
    """Turn what the library raises into an Error."""
    from huggingface_hub import errors

    repo, _, revision = name.partition("@")
    try:
        yield
    except Error:
        raise
    except errors.HFValidationError as error:
        raise Error(f"is no name on the hub ({error})", where=name) from error
    except errors.GatedRepoError as error:
        page = f"{_endpoint()}/{repo}"
        fix = f"accept its terms on {page}, then log in with `hf auth login` or set HF_TOKEN"
        raise Error("is given only to those who accept its terms", where=name, fix=fix) from error
    except errors.RevisionNotFoundError as error:
        fix = "name a branch, tag or commit"
        raise Error(f"has no revision '{revision or 'main'}'", where=name, fix=fix) from error
    except errors.RepositoryNotFoundError as error:
        what = "there is no such folder here, and on the hub no such model that you may see"
        fix = f"look at {_endpoint()}/{repo}; for a private one log in with `hf auth login` or set HF_TOKEN"
        raise Error(what, where=name, fix=fix) from error
    except Exception as error:  # no network, a broken answer, a full disk: many classes
        raise _not_fetched(name, error) from error


def _not_fetched(name: str, error: Exception) -> Error:
    from huggingface_hub import constants, errors

    here = "there is no such folder here"
    if isinstance(error, OSError) and error.errno is not None:
        return Error(f"cannot be fetched ({error.strerror})", where=name, fix="free some space or set HF_HOME")
    if constants.HF_HUB_OFFLINE:
        what = f"{here} and no whole copy in the hub's cache, and HF_HUB_OFFLINE is set"
        return Error(what, where=name, fix="unset HF_HUB_OFFLINE to fetch it")
    cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ else error
    reason = (str(cause).strip().partition("\n")[0] or type(cause).__name__)[:200]
    what = f"{here}, and it cannot be fetched from {_endpoint()} ({reason})"
    return Error(what, where=name, fix="look at the network, or name a folder")


def _endpoint() -> str:
    from huggingface_hub import constants

    return str(constants.ENDPOINT)
