"""The README's lines of Python run, and its figure is what its command prints."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from paths import ROOT

README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_the_lines_of_python_run(server):
    [lines] = blocks("python")
    assert "127.0.0.1:50051" in lines
    told = run("-c", lines.replace("127.0.0.1:50051", server.target))
    assert re.search(r"length_tokens\W+768\b", told)


def test_the_figure_is_what_its_command_prints(tmp_path):
    made, replayed = re.findall(r"^odma (.*?)(?: +#.*)?$", blocks("sh")[0], re.MULTILINE)
    run("-m", "odma_service", *made.split(), cwd=tmp_path)
    told = json.loads(run("-m", "odma_service", *replayed.split(), "--json", cwd=tmp_path))
    shown = re.findall(r"^([a-z0-9-]+) +(\d+)  (█+) ", README, re.MULTILINE)
    assert {name for name, _, _ in shown} == set(told["policies"])
    for name, figure, bar in shown:
        rate = told["policies"][name]["tokens_per_s"]
        assert (int(figure), len(bar)) == (round(rate), round(rate / 20)), name


def run(*command: str, cwd: Path | None = None) -> str:
    line = [sys.executable, *command]
    return subprocess.run(line, cwd=cwd, check=True, stdout=subprocess.PIPE, text=True).stdout
