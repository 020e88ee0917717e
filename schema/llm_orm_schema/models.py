"""Peewee models for an application to own: the records of llm_orm, with room for columns of its own."""

from collections.abc import Mapping

import peewee as pw

from llm_orm.records import BASES
from llm_orm.store import connect

from .ddl import table_names_of

_HEAD = '''\
"""The tables of llm_orm, as this application has them.

Add columns to these classes as you like, then:

    store = connect("postgresql://…", models=MODELS)

and let `llm-orm migrate --store your_module:store` add them to the database. Let new columns be nullable, or give them
constraints=[SQL("DEFAULT …")]: rows that exist need a value for them, and so do those that a turn writes.
"""

from llm_orm import records
'''

_MODEL = """

class {model}(records.{model}):
    class Meta:
        table_name = "{table}"
"""


def models_source(table_prefix: str = "", table_names: Mapping[str, str] | None = None) -> str:
    """A Python module with a model for each table, and MODELS, the list of them that connect() takes."""
    store = connect(pw.SqliteDatabase(None), table_prefix=table_prefix, table_names=table_names)
    tables = table_names_of(store.records)
    models = "".join(_MODEL.format(model=base.__name__, table=tables[name]) for name, base in BASES.items())
    return f"{_HEAD}{models}\n\nMODELS = [{', '.join(base.__name__ for base in BASES.values())}]\n"
