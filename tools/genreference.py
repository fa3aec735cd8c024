"""Generates docs/reference/api.md from the comments of proto/; --check tells if it is stale."""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from genproto import PROTO, ROOT, run_protoc
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    MethodDescriptorProto,
)

REFERENCE = ROOT / "docs" / "reference" / "api.md"
OPENING = """\
# The API

Generated from `proto/odma/v1` by `make proto`. The
[engine author's guide](../guides/engine.md) says how to use it.
"""

# Numbers of the fields of descriptor.proto, of which the path of a comment consists.
MESSAGES, ENUMS, SERVICES, SYNTAX = 4, 5, 6, 12
FIELDS, ONEOFS, VALUES, METHODS = 2, 8, 2, 2

# "  STATUS   what it means" or "  * a point", with its continuation further in.
ITEM = re.compile(r"  +(?:\* |([A-Z_]+)  +)(.*)")


class File:
    """One proto file: its declarations, and the comments on them."""

    def __init__(self, proto: FileDescriptorProto) -> None:
        self.proto = proto
        self._comments = {
            tuple(location.path): location.leading_comments
            for location in proto.source_code_info.location
        }
        self.messages = {message.name: i for i, message in enumerate(proto.message_type)}
        self.asked = {
            type_name(name): f"{service.name}{method.name}"
            for service in proto.service
            for method in service.method
            for name in (method.input_type, method.output_type)
        }

    def comment(self, *path: int) -> list[str]:
        """Return the lines of a comment, as they are written."""
        return [line.removeprefix(" ") for line in self._comments.get(path, "").splitlines()]

    def text(self, *path: int) -> str:
        """Return a comment as paragraphs and lists."""
        lines: list[str] = []
        for line in self.comment(*path):
            item = ITEM.match(line)
            if item:
                status = f"`{item[1]}`: " if item[1] else ""
                lines.append(f"- {status}{item[2]}")
            else:
                lines.append(f"  {line.strip()}" if line.startswith("  ") else line)
        return "\n".join(lines)

    def cell(self, *path: int) -> str:
        """Return a comment as one cell of a table."""
        return " ".join(self.comment(*path)).replace("|", "\\|")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    fresh = reference(described())
    if not parser.parse_args().check:
        REFERENCE.write_text(fresh)
    elif not REFERENCE.exists() or REFERENCE.read_text() != fresh:
        print("stale: docs/reference/api.md; run `make proto`", file=sys.stderr)
        return 1
    return 0


def described() -> list[File]:
    """Return every proto file, those with most rpcs first."""
    paths = sorted(PROTO.glob("odma/v*/*.proto"))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "set"
        run_protoc(PROTO, paths, "--include_source_info", f"--descriptor_set_out={out}")
        files = FileDescriptorSet.FromString(out.read_bytes()).file
    return sorted(map(File, files), key=lambda file: -len(file.asked))


def reference(files: Iterable[File]) -> str:
    """Return the whole page."""
    return "\n".join([OPENING, *(line for file in files for line in chapter(file))]).rstrip() + "\n"


def chapter(file: File) -> Iterator[str]:
    """Describe a file: its services, then what else it declares."""
    proto = file.proto
    names = ", ".join(service.name for service in proto.service)
    yield f"## {names or 'Shared values'}\n"
    yield f"{file.text(SYNTAX)}\n\n`proto/{proto.name}`\n"
    for i, service in enumerate(proto.service):
        yield f"{file.text(SERVICES, i)}\n"
        for k, method in enumerate(service.method):
            yield f"### {service.name}.{method.name}\n"
            yield f"{signature(method)}\n"
            yield f"{file.text(SERVICES, i, METHODS, k)}\n"
            for name in map(type_name, (method.input_type, method.output_type)):
                yield from fields(file, file.messages[name])
    for message, i in file.messages.items():
        if message not in file.asked:
            yield f"### {message}\n"
            yield f"{file.text(MESSAGES, i)}\n"
            yield from fields(file, i)
    for i, enum in enumerate(proto.enum_type):
        yield f"### {enum.name}\n"
        yield f"{file.text(ENUMS, i)}\n"
        yield from values(file, i, enum)


def signature(method: MethodDescriptorProto) -> str:
    asked = "stream " * method.client_streaming + type_name(method.input_type)
    answered = "stream " * method.server_streaming + type_name(method.output_type)
    return f"`rpc {method.name}({asked}) returns ({answered})`"


def fields(file: File, i: int) -> Iterator[str]:
    """Describe the fields of a message in a table."""
    message = file.proto.message_type[i]
    if message.nested_type or message.enum_type:
        raise SystemExit(f"{message.name}: nested declarations are not described")
    if not message.field:
        yield f"`{message.name}` has no fields.\n"
        return
    yield f"| {message.name} | | |\n| --- | --- | --- |"
    group = None
    for k, field in enumerate(message.field):
        if in_group(field) and field.oneof_index != group:
            group = field.oneof_index
            about = file.cell(MESSAGES, i, ONEOFS, group)
            yield f"| *one of `{message.oneof_decl[group].name}`* | | {about} |"
        about = file.cell(MESSAGES, i, FIELDS, k)
        yield f"| `{field.name}` = {field.number} | {kind(file, message, field)} | {about} |"
    yield ""


def in_group(field: FieldDescriptorProto) -> bool:
    """Whether a field is one of several; `optional` makes a oneof of its own that is none."""
    return field.HasField("oneof_index") and not field.proto3_optional


def kind(file: File, message: DescriptorProto, field: FieldDescriptorProto) -> str:
    """Return the type of a field, with a link to where it is described."""
    label = {field.LABEL_REPEATED: "repeated "}.get(field.label, "")
    if field.proto3_optional:
        label = "optional "
    if in_group(field):
        label = f"{message.oneof_decl[field.oneof_index].name}: "
    if field.type_name:
        name = type_name(field.type_name)
        return f"{label}[{name}](#{file.asked.get(name, name).lower()})"
    return label + field.Type.Name(field.type).removeprefix("TYPE_").lower()


def values(file: File, i: int, enum: EnumDescriptorProto) -> Iterator[str]:
    """Describe the values of an enum in a table."""
    yield f"| {enum.name} | |\n| --- | --- |"
    for k, value in enumerate(enum.value):
        yield f"| `{value.name}` = {value.number} | {file.cell(ENUMS, i, VALUES, k)} |"
    yield ""


def type_name(full: str) -> str:
    return full.rpartition(".")[2]


if __name__ == "__main__":
    raise SystemExit(main())
