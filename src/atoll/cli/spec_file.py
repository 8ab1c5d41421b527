"""Reading the file that says what to run: `atoll.toml`, or the same in JSON or YAML, or a worker's wrangler.toml."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from atoll.cli import wrangler
from atoll.model import codec
from atoll.model.errors import Invalid, NotFound
from atoll.model.spec import AppSpec, JobSpec, Workload, check_app, check_job

NAMES = ("atoll.toml", "atoll.yaml", "atoll.yml", "atoll.json")

W = TypeVar("W", AppSpec, JobSpec)


def find(where: Path) -> Path:
    """Return the spec in directory `where`, or `where` itself when it is a file. Raises NotFound with the mend."""
    if where.is_file():
        return where
    if not where.exists():
        raise NotFound(f"{where}: no such file or directory")
    for name in (*NAMES, *wrangler.NAMES):
        if (where / name).is_file():
            return where / name
    raise NotFound(
        f"{where}: no atoll.toml here",
        mend="write one (`atoll schema app` says what is in it), or pass --image and --name without a file",
    )


def read(path: Path) -> dict[str, Any]:
    """Return the plain data of a spec file. Raises Invalid, naming the file."""
    try:
        data = _parse(path)
    except OSError as error:
        raise Invalid(f"{path}: {error.strerror}") from None
    except Invalid as error:
        raise Invalid(f"{path}: {error}", mend=error.mend) from None
    if not isinstance(data, dict):
        raise Invalid(f"{path}: a spec is a table of names and values, this is a {type(data).__name__}")
    if path.name not in wrangler.NAMES:
        return data
    try:
        return wrangler.spec_data(data)
    except Invalid as error:
        raise Invalid(f"{path}: {error}", field=error.field, mend=error.mend) from None


def _parse(path: Path) -> object:
    text = path.read_bytes()
    if path.suffix == ".jsonc" or path.name == "wrangler.json":
        if len(text) > codec.INPUT_BYTES_MAX:
            raise Invalid(f"the file has {len(text)} bytes; at most {codec.INPUT_BYTES_MAX} are read")
        return wrangler.parse_jsonc(text.decode(errors="replace"))
    return codec.parse_text(text, path.suffix.lower())


def parse(data: dict[str, Any], kind: type[W], path: Path | None) -> W:
    """Return the spec that `data` holds, checked. Raises Invalid, naming the file and the field."""
    where = f"{path}: " if path is not None else ""
    try:
        spec = codec.convert(data, kind)
        if isinstance(spec, AppSpec):
            check_app(spec)
        else:
            check_job(spec)
        _check_image(spec)
        return spec
    except Invalid as error:
        raise Invalid(f"{where}{error}", field=error.field, mend=error.mend or _mend(error, data, kind, path)) from None


def _check_image(spec: Workload) -> None:
    """Raise Invalid for an image that no registry can have; whether it is there, only the node will know."""
    from atoll.images.reference import parse as parse_reference
    from atoll.model.errors import ImageError

    images = {"image": spec.image} | {f"volumes[{index}].image": volume.image for index, volume in enumerate(spec.volumes)}
    for field, image in images.items():
        try:
            parse_reference(image or "x", default_registry="registry.invalid")
        except ImageError as error:
            raise Invalid(f"{field}: {error}", field=field, mend=error.mend) from None


def _mend(error: Invalid, data: dict[str, Any], kind: type[Workload], path: Path | None) -> str | None:
    """For a misspelt name, the name that was meant; else where all names are, for what stands in a file."""
    from difflib import get_close_matches

    import msgspec

    noun = "job" if kind is JobSpec else "app"
    if "unknown field" in error.message:
        wrong = error.message.rpartition("`")[0].rpartition("`")[2]
        if kind is AppSpec and wrong in JobSpec.__struct_fields__:
            return "that is for jobs: run it with `atoll jobs run`"
        if kind is JobSpec and wrong in AppSpec.__struct_fields__:
            return "that is for apps: run it with `atoll deploy`"
        table = _struct_at(kind, error.field or "")
        close = get_close_matches(wrong, [field.encode_name for field in msgspec.structs.fields(table)], n=1) if table else []
        if close:
            return f"did you mean `{close[0]}`?"
    return f"`atoll schema {noun}` prints all fields and what they take" if path is not None else None


def _struct_at(kind: type[Any], path: str) -> type[Any] | None:
    """Return the record type at a path such as `resources.gpu` or `ports[...]`; None where it is not one."""
    import re
    from typing import get_args

    import msgspec

    found: Any = kind
    for name in re.findall(r"[A-Za-z_]+", path):
        fields = {field.encode_name: field.type for field in msgspec.structs.fields(found)}
        if name not in fields:
            return None
        candidates = [fields[name], *get_args(fields[name])]
        candidates += [inner for each in candidates for inner in get_args(each)]
        structs = [each for each in candidates if isinstance(each, type) and issubclass(each, msgspec.Struct)]
        if not structs:
            return None
        found = structs[0]
    return found if isinstance(found, type) else None
