"""The words of what was said: what search takes for one, and what keeps the index of them.

Found are the contents of messages and the results of tool calls; not those of a turn that runs, and no tokens of
encrypted content. On PostgreSQL the index is one of the column itself. On SQLite it is an FTS5 table that holds the
words and not the texts, which triggers keep in the transaction of whoever writes: a turn, a cascade, SQL by hand.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from .encryption import TOKEN

SEPARATORS = (
    r"\u0001-\u002f\u003a-\u0040\u005b-\u0060\u007b-\u00a9\u00ab-\u00b1\u00b4\u00b6-\u00b8\u00bb\u00bf\u00d7\u00f7"
    r"\u037e\u0387\u055a-\u055f\u0589\u058a\u05be\u05c0\u05c3\u05c6\u05f3\u05f4\u060c\u060d\u061b\u061d-\u061f"
    r"\u066a-\u066d\u06d4\u0964\u0965\u0e4f\u0e5a\u0e5b\u0f04-\u0f14\u104a-\u104f\u1360-\u1368\u17d4-\u17d6"
    r"\u17d8-\u17da\u1800-\u180a"
    r"\u2000-\u206f\u20a0-\u20cf\u2190-\u245f\u2500-\u2775\u2794-\u2bff\u2e00-\u2e2e\u2e30-\u2e5d\u3000-\u3004"
    r"\u3008-\u3020\u3030\u303d\u30a0\u30fb"
    r"\ufe00-\ufe19\ufe30-\ufe6b\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65\ufff9-\uffff\U0001f000-\U0001faff"
)
"""What stands between words, as a regular expression of PostgreSQL and of Python has it in its brackets.

PostgreSQL would take foo@bar.com, foo-bar and a/b for one word each, and what is no letter for one in some locales.
"""

MOST_CHARACTERS = 200_000
"""Of a text so many are in the index: PostgreSQL's holds 1 MB of each, and the words of this many never take more than
four bytes a character. A reply that is too long for the index must be written all the same.

What is in the index was put there with this number and these separators: to change one is to make the index anew.
"""


@dataclass(frozen=True)
class Made:
    """Something that the database makes of the tables, and the SQL that creates it.

    kind     "view", "search table" or "trigger"
    table    that it is on; of the others, its own name
    """

    kind: str
    name: str
    table: str
    create: str


@dataclass(frozen=True)
class Searched:
    """A column whose words are found, in which of its rows ({0} is the row), and what a change of that may change."""

    column: str
    holds: str
    watched: tuple[str, ...]

    def said(self, row: str = "") -> str:
        """What is true of the rows that are in the index, and of no others."""
        return self.holds.format(row)


_CLEAR = f"substr({{0}}%s, 1, {len(TOKEN)}) <> '{TOKEN}'"

SEARCHED = {
    "message": Searched(
        "content",
        "{0}content IS NOT NULL AND {0}status <> 'pending' AND " + _CLEAR % "content",
        ("id", "content", "status"),
    ),
    "tool_call": Searched("result", "{0}result IS NOT NULL AND " + _CLEAR % "result", ("id", "result")),
}
"""By the table."""


# PostgreSQL


def spaced(column: str) -> str:
    """The SQL of the words of a column with a space between each."""
    return f"regexp_replace(\"left\"({column}, {MOST_CHARACTERS}), '[{SEPARATORS}]+', ' ', 'g')"


def vector(column: str) -> str:
    """The SQL of what the index of a column is on."""
    return f"to_tsvector('simple'::regconfig, {spaced(column)})"


# SQLite


def search_table(stem: str) -> str:
    """The table with the words."""
    return f"{stem}_search"


def rows_table(stem: str) -> str:
    """The table that says whose they are. Rows of FTS5 have whole numbers, and ours have keys."""
    return f"{stem}_search_row"


def search_objects(stem: str, names: Mapping[str, str]) -> list[Made]:
    """What keeps the index on SQLite, in the order in which it is created."""
    words, rows = search_table(stem), rows_table(stem)
    # A contentless table has to be told what it forgets; of what no trigger saw, nothing is told.
    create_words = (
        f"CREATE VIRTUAL TABLE \"{words}\" USING fts5(words, content = '', tokenize = 'unicode61 remove_diacritics 0')"
    )
    create_rows = (
        f'CREATE TABLE "{rows}" (\n'
        "    id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,\n"
        "    kind TEXT NOT NULL,\n"
        "    row_id TEXT NOT NULL,\n"
        "    UNIQUE (row_id, kind)\n"
        ")"
    )
    made = [Made("search table", words, words, create_words), Made("search table", rows, rows, create_rows)]
    for kind, searched in SEARCHED.items():
        made += _triggers(words, rows, kind, names[kind], searched)
    return made


def _triggers(words: str, rows: str, kind: str, table: str, searched: Searched) -> list[Made]:
    def text(row: str) -> str:
        return f"substr({row}{searched.column}, 1, {MOST_CHARACTERS})"

    def mine(row: str) -> str:
        return f"row_id = {row}id AND kind = '{kind}'"

    old, new = searched.said("OLD."), searched.said("NEW.")
    forget = (
        f'INSERT INTO "{words}" ("{words}", rowid, words) SELECT \'delete\', id, {text("OLD.")} FROM "{rows}"\n'
        f"        WHERE {mine('OLD.')} AND {old};\n"
        f'    DELETE FROM "{rows}" WHERE {mine("OLD.")};\n'
    )
    # A row that is there already was left behind by INSERT OR REPLACE, which fires no trigger for what it deletes. Its
    # words stay, of an id that nothing has any more; so no id is given twice.
    remember = (
        f"INSERT OR REPLACE INTO \"{rows}\" (kind, row_id) SELECT '{kind}', NEW.id WHERE {new};\n"
        f'    INSERT INTO "{words}" (rowid, words) SELECT id, {text("NEW.")} FROM "{rows}"\n'
        f"        WHERE {mine('NEW.')} AND {new};\n"
    )
    changed = " OR ".join(f"OLD.{column} IS NOT NEW.{column}" for column in searched.watched)
    events = {
        "insert": (f'AFTER INSERT ON "{table}" WHEN {new}', remember),
        "update": (
            f'AFTER UPDATE OF {", ".join(searched.watched)} ON "{table}" WHEN {changed}',
            f"{forget}    {remember}",
        ),
        "delete": (f'AFTER DELETE ON "{table}" WHEN {old}', forget),
    }
    return [
        Made("trigger", name, table, f'CREATE TRIGGER "{name}" {event}\nBEGIN\n    {body}END')
        for name, event, body in ((f"{table}_search_{verb}", *each) for verb, each in events.items())
    ]


def fill(stem: str, names: Mapping[str, str]) -> list[str]:
    """The SQL that puts into the index of SQLite what was there before it, and is not in it yet."""
    words, rows = search_table(stem), rows_table(stem)
    statements = []
    for kind, searched in SEARCHED.items():
        statements += [
            f'INSERT OR IGNORE INTO "{rows}" (kind, row_id)\n'
            f"    SELECT '{kind}', id FROM \"{names[kind]}\" WHERE {searched.said()} ORDER BY created_at",
            f'INSERT INTO "{words}" (rowid, words)\n'
            f'    SELECT entry.id, substr(said.{searched.column}, 1, {MOST_CHARACTERS}) FROM "{rows}" AS entry\n'
            f"    JOIN \"{names[kind]}\" AS said ON said.id = entry.row_id AND entry.kind = '{kind}'\n"
            f'    WHERE entry.id NOT IN (SELECT id FROM "{words}_docsize") ORDER BY entry.id',
        ]
    return statements
