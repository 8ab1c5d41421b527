"""Bytes to records and back: the one place where input is validated.

JSON is the form in the store, on the wire and on disk; TOML and YAML are read where people write specs.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import msgspec

from atoll.model.errors import Invalid, NotFound
from atoll.model.units import Bytes, Cores, Seconds

T = TypeVar("T")

_QUANTITIES = (Bytes, Seconds, Cores)
_PATH = re.compile(r"(?P<what>.*?)(?: - at (?P<key>`key` in )?`(?P<path>[^`]*)`)?", re.DOTALL)
_WORDS = {
    "array": "a list",
    "object": "a table",
    "str": "text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
}
"""msgspec's types as people who write specs know them."""
_TYPES = re.compile(r"`([a-z]+(?: \| [a-z]+)*)`")
_REGEX = re.compile(r"expected text matching regex (.*)", re.DOTALL)
UNKNOWN = "unknown field"
INPUT_BYTES_MAX = 1 << 20
"""The largest spec or request body that is decoded, in bytes."""


def _decode_quantity(kind: type[Any], value: object) -> object:
    if kind in _QUANTITIES:
        return kind.parse(value)
    raise NotImplementedError(f"no decoder for {kind}")


def _encode_quantity(value: object) -> object:
    if isinstance(value, Bytes):
        return int(value)
    if isinstance(value, (Seconds, Cores)):
        return float(value)
    raise NotImplementedError(f"no encoder for {type(value)}")


def _schema_quantity(kind: type[Any]) -> dict[str, object]:
    if kind is Bytes:
        return {"type": ["integer", "string"], "description": "bytes, or e.g. '256MiB'", "examples": ["256MiB", 1048576]}
    if kind is Seconds:
        return {"type": ["number", "string"], "description": "seconds, or e.g. '1m30s'", "examples": ["30s", 5]}
    if kind is Cores:
        return {"type": "number", "minimum": 0.01, "description": "cores", "examples": [0.5]}
    raise NotImplementedError(f"no schema for {kind}")


_encoder = msgspec.json.Encoder(enc_hook=_encode_quantity)
_decoders: dict[Any, msgspec.json.Decoder[Any]] = {}


def encode(record: object) -> bytes:
    """Return `record` as compact JSON; `decode` of the same type gives an equal record."""
    return _encoder.encode(record)


def decode(data: bytes, kind: type[T]) -> T:
    """Return the record that `data` (JSON) holds. Raises Invalid, naming the field."""
    decoder = _decoders.get(kind)
    if decoder is None:
        decoder = _decoders[kind] = msgspec.json.Decoder(kind, dec_hook=_decode_quantity)
    try:
        record: T = decoder.decode(data)
    except msgspec.ValidationError as error:
        raise invalid(error, kind) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Invalid(f"not valid JSON: {error}") from None
    return record


def convert(value: object, kind: type[T]) -> T:
    """Return the record that plain Python data (dicts, lists, numbers) holds. Raises Invalid, naming the field."""
    try:
        record: T = msgspec.convert(value, kind, dec_hook=_decode_quantity, str_keys=True)  # as in JSON, where every key is text
    except msgspec.ValidationError as error:
        raise invalid(error, kind) from None
    except RecursionError:
        raise Invalid("nested too deeply") from None
    return record


def decode_known(data: bytes, kind: type[T]) -> T:
    """As `decode`, for what a peer says that may be of the next version: fields that this one does not know are left out.

    What people write is read with `decode`, which refuses them.
    """
    try:
        return decode(data, kind)
    except Invalid as error:
        if UNKNOWN not in error.message:
            raise
    return convert(known(kind, msgspec.json.decode(data)), kind)


def convert_known(value: object, kind: type[T]) -> T:
    """As `convert`, and as `decode_known`."""
    try:
        return convert(value, kind)
    except Invalid as error:
        if UNKNOWN not in error.message:
            raise
    return convert(known(kind, value), kind)


def known(kind: Any, value: Any, left_out: set[str] | None = None, path: str = "") -> Any:
    """Return plain data without the fields that a `kind` does not have. Those that would have been refused are added to `left_out`,
    as `spec.ports.port`: without indexes and keys."""
    origin = get_origin(kind)
    struct = origin if isinstance(origin, type) else kind
    if isinstance(struct, type) and issubclass(struct, msgspec.Struct):
        if not isinstance(value, dict):
            return value
        config = struct.__struct_config__
        kept = {field.encode_name: field.type for field in msgspec.structs.fields(kind)} | {config.tag_field: None}
        before = f"{path}." if path else ""
        if left_out is not None and config.forbid_unknown_fields:
            left_out.update(f"{before}{name}" for name in value if name not in kept)
        return {name: known(kept[name], inner, left_out, f"{before}{name}") for name, inner in value.items() if name in kept}
    arguments = get_args(kind)
    if isinstance(value, dict):
        if origin is dict:
            return {name: known(arguments[1], inner, left_out, path) for name, inner in value.items()}
        candidates = [one for one in arguments if _takes(one, value)]
        return known(candidates[0], value, left_out, path) if candidates else value
    if isinstance(value, (list, tuple)):
        if origin in (tuple, list):
            return [known(arguments[0], inner, left_out, path) for inner in value]
        candidates = [one for one in arguments if get_origin(one) in (tuple, list)]
        return known(candidates[0], value, left_out, path) if candidates else value
    return value


def _takes(kind: Any, value: dict[str, Any]) -> bool:
    """Whether one kind of several is meant by a table: by its tag, where it has one."""
    origin = get_origin(kind)
    struct = origin if isinstance(origin, type) else kind
    if isinstance(struct, type) and issubclass(struct, msgspec.Struct):
        config = struct.__struct_config__
        return config.tag_field is None or value.get(config.tag_field, config.tag) == config.tag
    return origin is dict or any(_takes(one, value) for one in get_args(kind) if origin not in (tuple, list))


def to_plain(record: object) -> Any:
    """Return `record` as plain Python data, ready for any serialiser."""
    return msgspec.to_builtins(record, enc_hook=_encode_quantity)


def parse_text(text: bytes, suffix: str) -> Any:
    """Return the plain data in a file that people wrote; `suffix` is `.toml`, `.json`, `.yaml` or `.yml`.

    Raises Invalid for a file that does not parse, and for one over `INPUT_BYTES_MAX`.
    """
    if len(text) > INPUT_BYTES_MAX:
        raise Invalid(f"the file has {len(text)} bytes; at most {INPUT_BYTES_MAX} are read")
    try:
        match suffix:
            case ".toml":
                return msgspec.toml.decode(text)
            case ".json":
                return msgspec.json.decode(text)
            case ".yaml" | ".yml":
                return msgspec.yaml.decode(text)
            case _:
                raise Invalid(f"unknown file type {suffix!r}", mend="name the file .toml, .json or .yaml")
    except UnicodeDecodeError as error:
        raise Invalid(f"not text in UTF-8 (byte {error.start})", mend="save it as UTF-8") from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise Invalid(f"not valid {suffix.lstrip('.').upper()}: {error}") from None


def read_text(path: Path, bytes_max: int) -> str:
    """Return what a person's file says. Raises NotFound, and Invalid for one that is too large, no UTF-8, or unreadable."""
    try:
        if path.stat().st_size > bytes_max:
            raise Invalid(f"{path} has over {bytes_max >> 20} MiB")
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise NotFound(f"{path} is not there") from None
    except (OSError, UnicodeDecodeError) as error:
        raise Invalid(f"{path} cannot be read: {error}") from None


def json_schema(kind: Any) -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of a record type, made from the code."""
    (schema,), definitions = json_schemas((kind,), "#/$defs/{name}")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "$defs": definitions}


def json_schemas(kinds: Sequence[Any], ref_template: str) -> tuple[tuple[dict[str, Any], ...], dict[str, Any]]:
    """Return the schemas of several types, and by name those of all records in them, to which `ref_template` refers."""
    schemas, definitions = msgspec.json.schema_components(kinds, schema_hook=_schema_quantity, ref_template=ref_template)
    structs: set[type[msgspec.Struct]] = set()
    for kind in kinds:
        _structs(kind, structs)
    for struct in structs:
        definition = definitions[struct.__name__]
        tag = struct.__struct_config__.tag_field
        if tag is not None:  # read where it is there, never asked for
            definition["required"].remove(tag)
        for field in msgspec.structs.fields(struct):
            if field.default_factory is not msgspec.NODEFAULT:
                definition["properties"][field.encode_name]["default"] = to_plain(field.default_factory())
    return schemas, definitions


def _structs(kind: Any, seen: set[type[msgspec.Struct]]) -> set[type[msgspec.Struct]]:
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        if kind not in seen:
            seen.add(kind)
            for field in msgspec.structs.fields(kind):
                _structs(field.type, seen)
    else:
        for argument in get_args(kind):
            _structs(argument, seen)
    return seen


def _in_words(match: re.Match[str]) -> str:
    names = [name for name in match[1].split(" | ") if name != "null"]
    return " or ".join(_WORDS[name] for name in names) if names and all(name in _WORDS for name in names) else match[0]


def _choices(kind: Any, steps: list[str]) -> list[str]:
    """Return the values of the enumeration that a field of `kind` takes, for its path in steps; empty where it takes none."""
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        fields = {field.encode_name: field.type for field in msgspec.structs.fields(kind)}
        return _choices(fields[steps[0]], steps[1:]) if steps and steps[0] in fields else []
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return [] if steps else [str(member.value) for member in kind]
    inner = steps[1:] if steps and steps[0] == "[]" and get_origin(kind) in (tuple, list, dict) else steps
    return next((found for argument in get_args(kind) if (found := _choices(argument, inner))), [])


def _described(kind: Any, regex: str, seen: set[Any]) -> str | None:
    """Return what the description of a `kind` says about texts that match `regex`, as Python quotes it."""
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        if kind in seen:
            return None
        seen.add(kind)
        inner = [field.type for field in msgspec.structs.fields(kind)]
    else:
        for meta in getattr(kind, "__metadata__", ()):
            if isinstance(meta, msgspec.Meta) and meta.pattern is not None and repr(meta.pattern) == regex:
                return meta.description
        inner = [*get_args(kind), *([get_origin(kind)] if get_origin(kind) is not None else [])]
    return next((found for each in inner if (found := _described(each, regex, seen))), None)


def _tag(kind: Any, steps: list[str]) -> str | None:
    """Return what the field that tells kinds of records apart must say, if the path in steps names one."""
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        config = kind.__struct_config__
        if len(steps) == 1:
            return str(config.tag) if config.tag_field == steps[0] else None
        fields = {field.encode_name: field.type for field in msgspec.structs.fields(kind)}
        return _tag(fields[steps[0]], steps[1:]) if steps and steps[0] in fields else None
    inner = steps[1:] if steps[:1] == ["[]"] else steps
    return next((found for argument in get_args(kind) if (found := _tag(argument, inner))), None)


def invalid(error: msgspec.ValidationError, kind: Any = None) -> Invalid:
    """Return msgspec's error about a `kind` in our words, with the path of the field and, where it is one of a few, the values."""
    match = _PATH.fullmatch(str(error))
    what, path = (match["what"], match["path"]) if match else (str(error), None)
    field = path.removeprefix("$").lstrip(".") if path else None
    if what.startswith("Expected "):
        what = "e" + _TYPES.sub(_in_words, what)[1:]
    if (regex := _REGEX.fullmatch(what)) and (words := _described(kind, regex[1], set())):
        what = f"expected {words}"
    what = what.replace("Object contains unknown field", UNKNOWN).replace("Object missing required field", "missing")
    mend = None
    steps = re.sub(r"\[[^\]]*\]", ".[]", field).split(".") if field else []
    if steps and what.startswith(("Invalid enum value", "expected text")):
        what = what.replace("Invalid enum value", "no such value:")
        choices = _choices(kind, steps)
        mend = f"use one of {', '.join(choices)}" if choices else None
    elif steps and what.startswith("Invalid value") and (tag := _tag(kind, steps)) is not None:
        what = what.replace("Invalid value", "no such value here:")
        mend = f"write '{tag}', or leave it out"
    if match and match["key"]:
        what = f"a key of it: {what}"
    return Invalid(f"{field}: {what}" if field else what, field=field or None, mend=mend)
