"""Every code block of the README and the docs runs, in order, one page one program.

The model behind a page is the tests' provider, reached through the real litellm. What it says to the next blocks stands
before them in comments, which nobody who reads the page sees:

    <!-- says: get_weather(city="London") | It is cold. -->      a tool call, then a text
    <!-- fails: 429 times 4 -->                                   an HTTP error, four times
"""

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from provider import Answer, Call, Provider

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

BLOCK = re.compile(
    r"^<!-- (?P<kind>says|fails): (?P<script>.*?) -->$|^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S
)
RUN_BY_CI = (".venv/bin/llm-orm demo", ".venv/bin/python -m pytest")
NOT_CODE = ("text", "mermaid")


@pytest.fixture
def provider(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, real_litellm: None) -> Iterator[Provider]:
    """The provider that OPENAI_API_KEY is for, and an empty folder to work in."""
    with Provider() as provider:
        monkeypatch.setenv("OPENAI_API_KEY", "test-key")
        monkeypatch.setenv("OPENAI_BASE_URL", f"{provider.url}/v1")
        monkeypatch.chdir(tmp_path)
        yield provider


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_code_block_of_the_page_runs(page: Path, provider: Provider):
    text = page.read_text()
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in BLOCK.finditer(text):
        if block["kind"]:
            script(provider, block["kind"], block["script"])
            continue
        line = text[: block.start()].count("\n") + 2
        run(block["language"], block["code"], namespace, f"{page.name}:{line}")
    assert not provider._steps, "the page scripts replies that it does not ask for"


def script(provider: Provider, kind: str, text: str) -> None:
    if kind == "fails":
        status, _, times = text.partition(" times ")
        provider.fail(int(status), times=int(times or 1))
        return
    for said in text.split(" | "):
        call = re.fullmatch(r"(\w+)\((.*)\)", said)
        if call is None:
            provider.reply(Answer(said, input_tokens=20, output_tokens=6))
        else:
            tree = ast.parse(said, mode="eval").body
            assert isinstance(tree, ast.Call)
            arguments = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in tree.keywords}
            provider.reply(Answer(tool_calls=[Call(call[1], arguments)], input_tokens=20, output_tokens=6))


def run(language: str, code: str, namespace: dict[str, Any], where: str) -> None:
    if language == "python":
        exec(compile(code, where, "exec"), namespace)
    elif language in ("sh", "console"):
        for command in code.splitlines():
            if not command.endswith(RUN_BY_CI) and command.startswith("llm-orm"):
                run_command(command, where)
            else:
                assert command.endswith(RUN_BY_CI), f"{where}: nothing runs {command!r}"
    elif language == "sql":
        store = namespace["store"]
        with store.connection():
            for statement in filter(str.strip, code.split(";")):
                store.database.execute_sql(statement).fetchall()
    else:
        assert language in NOT_CODE, f"{where}: a block of {language or 'nothing'!r} does not run"


def run_command(command: str, where: str) -> None:
    from llm_orm_cli import main

    words, _, comment = command.partition("  #")
    result = CliRunner().invoke(main, shlex.split(words)[1:])
    wanted = 1 if "exits with 1" in comment else 0
    assert result.exit_code == wanted, f"{where}: {command!r}: {result.output}"


def test_ci_runs_the_two_commands_of_the_readme():
    ours = (ROOT / ".ci" / "run").read_text()
    commands = re.findall(r"^```sh\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)

    assert [command.strip().endswith(ending) for command, ending in zip(commands, RUN_BY_CI, strict=True)] == [True] * 2
    assert "README.md" in ours


def test_the_schema_page_names_every_column_of_every_table():
    from llm_orm.records import BASES

    sections = (ROOT / "docs" / "schema.md").read_text().split("\n## ")
    for name, record in BASES.items():
        section = next(section for section in sections if section.startswith(f"llm_{name}\n"))
        columns = {field.column_name for field in record._meta.sorted_fields}  # type: ignore[attr-defined]
        assert {column for column in columns if f"`{column}`" not in section} == set(), name
