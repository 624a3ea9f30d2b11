"""Typed configuration: nested frozen dataclasses from YAML recipes and `--set a.b=c`.

pydantic does the typing, because it takes the standard library's dataclasses as they are and reports
each fault with its place; the sentences are ours.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import inspect
import itertools
import types
import typing
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from gemstill.core.errors import Error

T = TypeVar("T")
Place = tuple[str | int, ...]  # the way to a field: ("model", "layers") or ("sources", 0, "weight")


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a key given twice is a fault, where PyYAML would take the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode):
                if key_node.value in seen:
                    twice = f"'{key_node.value}' stands here twice"
                    raise yaml.MarkedYAMLError(problem=twice, problem_mark=key_node.start_mark)
                seen.add(key_node.value)
        return super().construct_mapping(node, deep)


Override = str | tuple[str, Any]  # "a.b=c" with c in YAML, or the dotted name and the value itself


def parse(cls: type[T], source: str | Path | Mapping[str, Any] | None = None, overrides: Iterable[Override] = ()) -> T:
    """Build `cls`, a dataclass, from a YAML file (or a mapping) with `overrides` ("a.b=c") over it.

    Raises:
        Error: the file cannot be read or is no YAML, a field is unknown (the nearest one is named),
            missing or of a wrong type, or the dataclass itself refuses a value.
    """
    from pydantic import TypeAdapter, ValidationError

    named = isinstance(source, str | Path)
    data = _read(Path(source)) if isinstance(source, str | Path) else _copy(source or {})
    origin: dict[Place, str] = {}
    for override in overrides:
        place, value, said = _split(override)
        _put(data, place, value, said)
        origin[place] = said

    def where(place: Place) -> str:
        for length in range(len(place), 0, -1):
            if place[:length] in origin:
                return origin[place[:length]]
        return str(source) if named else ""

    _check_names(cls, data, (), where)
    try:
        return TypeAdapter(cls).validate_python(data)
    except ValidationError as error:
        first = error.errors()[0]
        raise _fault(first, where) from None
    except Error as error:
        # A dataclass refused its values: say in which recipe.
        recipe = str(source) if named else next(iter(origin.values())) if len(origin) == 1 else ""
        if not recipe or recipe in error.where:
            raise
        raise Error(error.what, where=f"{recipe}: {error.where}" if error.where else recipe, fix=error.fix) from None


def as_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain values (str, int, float, bool, None, list, dict), ready for YAML or JSON."""
    plain: dict[str, Any] = _plain(config)
    return plain


def dump(config: Any) -> str:
    """A configuration as YAML; `parse` reads the same configuration back."""
    return yaml.safe_dump(as_dict(config), sort_keys=False, allow_unicode=True)


def nearest(name: str, known: Iterable[str]) -> str:
    """How to mend a wrong name: "did you mean 'x'?", or the names there are."""
    names = [str(item) for item in known]
    near = difflib.get_close_matches(name, names, 1, cutoff=0.5)
    return f"did you mean '{near[0]}'?" if near else f"known: {', '.join(names)}"


class Field(typing.NamedTuple):
    """One line of a recipe, for help texts."""

    name: str  # dotted: "optimizer.learning_rate"; the entries of a list are number 0: "data.sources.0.folder"
    type: str
    default: str | None  # None where a value is required
    help: str  # the comment that stands beside or above the field


def fields(cls: type[Any], prefix: str = "") -> list[Field]:
    """All fields of a configuration, nested ones by their dotted names, with their comments as help."""
    hints, comments, found = typing.get_type_hints(cls), _comments(cls), []
    for field in dataclasses.fields(cls):
        inner, many = _dataclasses_in(hints[field.name])
        if inner is not None:
            found += fields(inner, f"{prefix}{field.name}.0." if many else f"{prefix}{field.name}.")
            continue
        default: str | None = None
        if field.default is not dataclasses.MISSING:
            default = _shown(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            default = _shown(field.default_factory())
        found.append(Field(prefix + field.name, _type_name(hints[field.name]), default, comments.get(field.name, "")))
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise Error(f"cannot be read ({error.strerror})", where=path, fix="name a YAML recipe") from error
    except UnicodeDecodeError as error:
        raise Error("is no UTF-8 text", where=path, fix="name a YAML recipe") from error
    except RecursionError as error:
        raise Error("is nested too deeply", where=path, fix="a recipe has lines like 'name: value'") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark else ""
        raise Error(f"is not valid YAML{line}: {getattr(error, 'problem', None) or error}", where=path) from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise Error("holds no fields", where=path, fix="a recipe has lines like 'name: value'")
    return data


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list | tuple) else value


def _split(override: Override) -> tuple[Place, Any, str]:
    """The place, the value, and how the user said it."""
    if isinstance(override, str):
        said = f"--set {override}"
        name, equals, text = override.partition("=")
        if not equals or not name.strip():
            raise Error("is no setting", where=said, fix="write --set path.to.field=value")
        try:
            value = yaml.load(text, Loader=_Loader) if text else ""
        except yaml.YAMLError:
            value = text
    else:
        name, value = override
        said = f"--{name.replace('_', '-')} {value}"
    return tuple(int(part) if part.isdigit() else part for part in name.strip().split(".")), value, said


def _put(data: Any, place: Place, value: Any, said: str) -> None:
    for part, following in itertools.pairwise(place):
        if isinstance(data, list) and isinstance(part, int) and part <= len(data):
            if part == len(data):  # the next entry of a list
                data.append([] if isinstance(following, int) else {})
            data = data[part]
        elif isinstance(data, dict):
            if not isinstance(data.get(part), dict | list):
                data[part] = [] if isinstance(following, int) else {}
            data = data[part]
        else:
            raise Error(f"there is no '{part}' to set", where=said)
    last = place[-1]
    if isinstance(data, list):
        if not isinstance(last, int) or last > len(data):
            raise Error(f"there is no entry '{last}' to set", where=said)
        data[last : last + 1] = [value]
    else:
        data[last] = value


def _dataclasses_in(hint: Any) -> tuple[type[Any] | None, bool]:
    """The one dataclass that a type stands for, and whether it is the type of a list's entries."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return hint, False
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    found = [pair for pair in map(_dataclasses_in, inner) if pair[0]]
    if len(found) != 1:
        return None, False
    is_union = origin in (typing.Union, types.UnionType, typing.Annotated)
    return found[0][0], found[0][1] if is_union else True


def _check_names(cls: type[Any], data: Any, place: Place, where: typing.Callable[[Place], str]) -> None:
    if not isinstance(data, dict):
        return
    hints = typing.get_type_hints(cls)
    known = [field.name for field in dataclasses.fields(cls) if field.init]
    for name, value in data.items():
        here = (*place, name)
        if name not in known:
            raise Error(f"there is no field '{_dotted(here)}'", where=where(here), fix=nearest(str(name), known))
        inner, many = _dataclasses_in(hints[name])
        if inner is not None:
            entries = list(enumerate(value)) if many and isinstance(value, list) else []
            for index, entry in entries:
                _check_names(inner, entry, (*here, index), where)
            if not many:
                _check_names(inner, value, here, where)


_SENTENCES = {
    "dataclass_type": "a group of fields",
    "path_type": "a path",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "float_parsing": "a number",
    "float_type": "a number",
    "string_type": "a text",
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "list_type": "a list",
}


def _fault(fault: Any, where: typing.Callable[[Place], str]) -> Error:
    # Union members and the like add parts to the place that are no fields: they hold brackets.
    place = tuple(part for part in fault["loc"] if isinstance(part, int) or part.isidentifier())
    name = _dotted(place) or "the recipe"
    if fault["type"] in ("missing", "missing_argument"):
        return Error(f"'{name}' has no value", where=where(place), fix=f"give one: --set {name}=…")
    message = _SENTENCES.get(fault["type"]) or fault["msg"].removeprefix("Input should be ")
    given = fault["input"]
    shown = f"'{given}'" if isinstance(given, str) else repr(given)
    return Error(f"'{name}' is {shown[:80]}", where=where(place), fix=f"it should be {message}")


def _dotted(place: Place) -> str:
    return ".".join(map(str, place))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value) if field.init}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, enum.Enum):
        return value.value
    return str(value) if isinstance(value, Path) else value


def _shown(value: Any) -> str:
    """A default as a recipe would say it."""
    text: str = yaml.safe_dump(_plain(value), default_flow_style=True, width=1000)
    return text.removesuffix("...\n").strip()


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return "|".join(map(str, typing.get_args(hint)))
    if isinstance(hint, type) and not typing.get_args(hint):
        return {"Path": "path", "str": "text"}.get(hint.__name__, hint.__name__)
    name = str(hint).replace("pathlib.", "").replace("typing.", "").replace(" | ", "|").replace("None", "null")
    return name.replace("Path", "path").replace("str", "text")


def _comments(cls: type[Any]) -> dict[str, str]:
    """The comment beside each field of a dataclass (and of those it inherits from), or the ones above it."""
    found: dict[str, str] = {}
    for kind in reversed(cls.__mro__[:-1]):
        try:
            lines = [line.strip() for line in inspect.getsource(kind).splitlines()]
        except (OSError, TypeError):
            continue
        names, above = set(kind.__annotations__), list[str]()
        for line in lines:
            code, _, comment = line.partition("  # ")
            name = code.partition(":")[0]
            if name in names:
                found[name] = comment.split("fmt: ")[0].strip() or " ".join(above)
                names.discard(name)
            above = [*above, line[2:]] if line.startswith("# ") else []
    return found
