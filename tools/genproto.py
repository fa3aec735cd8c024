"""Generates odma_service/rpc from proto/, or with --check tells whether it is stale.

protoc writes Python modules for the package path of the proto, `odma.v1`. Ours live
under `odma_service.rpc.v1`, so imports are rewritten; what goes over the wire (file
names, message and service names) is not.
"""

from __future__ import annotations

import argparse
import filecmp
import re
import shutil
import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PROTO = ROOT / "proto"
RPC = ROOT / "odma_service" / "rpc"

HEADER = '"""Generated from proto/ by tools/genproto.py. Do not edit."""\n'

# `from odma.v1 import x_pb2`, and the module name that messages report as their own.
MODULE_PATH = re.compile(r"(?m)^from odma\.(?=v\d+ import )|(?<=')odma\.(?=v\d+\.\w+_pb2')")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    check = parser.parse_args().check
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder) / "rpc"
        generate(PROTO, fresh)
        if not check:
            shutil.rmtree(RPC, ignore_errors=True)
            shutil.copytree(fresh, RPC)
            return 0
        differing = difference(fresh, RPC)
    for path in differing:
        print(f"stale: odma_service/rpc/{path}; run `make proto`", file=sys.stderr)
    return 1 if differing else 0


def generate(proto: Path, out: Path) -> None:
    """Fill `out` with a package that has one subpackage per version of the protos."""
    files = sorted(proto.glob("odma/v*/*.proto"))
    services = [file for file in files if re.search(r"(?m)^service ", file.read_text())]
    with tempfile.TemporaryDirectory() as raw:
        run_protoc(proto, files, f"--python_out={raw}", f"--mypy_out=quiet:{raw}")
        run_protoc(proto, services, f"--grpc_python_out={raw}", f"--mypy_grpc_out=quiet:{raw}")
        shutil.copytree(Path(raw) / "odma", out)
    for module in out.glob("v*/*.py*"):
        module.write_text(MODULE_PATH.sub(rehomed, module.read_text()))
    for package in (out, *out.glob("v*")):
        (package / "__init__.py").write_text(HEADER)


def rehomed(match: re.Match[str]) -> str:
    return match[0].replace("odma.", "odma_service.rpc.")


def run_protoc(proto: Path, files: list[Path], *outputs: str) -> None:
    # protoc finds the mypy plugins beside the interpreter, whatever the PATH.
    beside = Path(sys.executable).parent
    plugins = [f"--plugin={beside / name}" for name in ("protoc-gen-mypy", "protoc-gen-mypy_grpc")]
    status = protoc.main(["protoc", f"-I{proto}", *plugins, *outputs, *map(str, files)])
    if status != 0:
        raise SystemExit(status)


def difference(fresh: Path, committed: Path) -> list[Path]:
    """Return the files that are missing, left over or different."""

    def names(folder: Path) -> set[Path]:
        found = (path for path in folder.rglob("*") if path.suffix in {".py", ".pyi"})
        return {path.relative_to(folder) for path in found}

    return sorted(
        name
        for name in names(fresh) | names(committed)
        if not (fresh / name).exists()
        or not (committed / name).exists()
        or not filecmp.cmp(fresh / name, committed / name, shallow=False)
    )


if __name__ == "__main__":
    raise SystemExit(main())
