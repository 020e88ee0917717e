"""docs/cli.md: its reference is what the commands say, and its examples run."""

import re
import runpy
import shlex
import tempfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from llm_orm_cli import main

DOCS = Path(__file__).parents[2] / "docs"


def test_the_reference_is_what_the_commands_say_of_themselves() -> None:
    page = runpy.run_path(str(DOCS / "cli.py"))["page"]()
    written = (DOCS / "cli.md").read_text(encoding="utf-8")
    assert written == page, 'docs/cli.md is not what the commands say; run "python docs/cli.py"'


def test_every_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    examples = re.findall(r"^```sh\n(.*?)^```", (DOCS / "cli.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    lines = [line for example in examples for line in example.splitlines()]
    assert lines
    for line in lines:
        program, *arguments = shlex.split(line)
        assert program == "llm-orm"
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, f"{line}\n{result.output}"
