"""What the database looks like.

ddl.py        the tables as SQL, made from the records
catalog.py    the tables that a database has
compare.py    the difference of the two
migrate.py    the way from one to the other; the steps are in migrations/
"""
