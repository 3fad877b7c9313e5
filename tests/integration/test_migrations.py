"""Migrations widen first: the code of the release before goes on working with the schema of this one, and loses nothing."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.script import ScriptDirectory

from scheduler.db import Database, _alembic
from scheduler.migrations import versions
from tests.support.postgres import PostgresServer

ALLOWED = {
    ("0002_sweeping_costs_no_history", "drop_index"): "an index holds no data, and no code names it",
    ("0008_the_queue", "drop_index"): "the same",
    ("0022_builds_have_needs", "drop_index"): "the same; the release before claims more slowly without, and rightly",
}
"""What takes something away, or makes it another, and why that may be: (migration, call or SQL verb)."""
_TAKES_AWAY = ("DROP ", "RENAME ", "DELETE ", "TRUNCATE ", "ALTER COLUMN")
Rows = dict[str, list[dict[str, Any]]]


def migrations() -> list[Path]:
    folder = Path(next(iter(versions.__path__)))
    return sorted(folder.glob("[0-9]*.py"))


def calls(path: Path) -> Iterator[str]:
    """Each call of alembic, and each verb of SQL, that could take something away."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name = node.func.attr
            if name.startswith(("drop_", "rename_")) or name in ("alter_column", "batch_alter_table"):
                yield name
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from (verb.strip() for verb in _TAKES_AWAY if node.value.upper().startswith(verb))


def test_no_migration_takes_anything_away() -> None:
    found = {(path.stem, call) for path in migrations() for call in calls(path)}
    assert found == set(ALLOWED), "widen first; where nothing else will do, say why in ALLOWED, two releases later"


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def empty(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """A database without any schema, once on each kind."""
    if request.param == "sqlite":
        database = Database(f"sqlite:///{tmp_path / 'records.db'}")
        yield database
        database.dispose()
        return
    server: PostgresServer = request.getfixturevalue("postgres_server")
    with server.database() as url:
        database = Database(url)
        yield database
        database.dispose()


def reflected(db: Database) -> sa.MetaData:
    metadata = sa.MetaData()
    metadata.reflect(db.engine)
    metadata.remove(metadata.tables["alembic_version"])
    return metadata


def a_value(column: sa.Column[Any], number: int) -> Any:
    """A value that the column takes, other for each number; a reference names the row of the same number."""
    for key in column.foreign_keys:
        return a_value(key.column, number)
    if isinstance(column.type, sa.JSON):
        return {"number": number}
    if isinstance(column.type, sa.Boolean):
        return bool(number % 2)
    if isinstance(column.type, sa.LargeBinary):
        return f"{number}".encode()
    if isinstance(column.type, sa.Integer):
        return number
    assert isinstance(column.type, sa.String), (column, column.type)
    return "SUCCEEDED" if column.name == "state" else f"{column.name}-{number}"[: column.type.length]


def write(db: Database, metadata: sa.MetaData, number: int) -> Rows:
    """A row in each table, as code would write it that knows these tables and columns; what was written."""
    rows: Rows = {}
    with db.engine.begin() as connection:
        for table in metadata.sorted_tables:
            row = {column.name: a_value(column, number) for column in table.columns}
            connection.execute(sa.insert(table).values(row))
            rows[table.name] = [row]
    return rows


def test_every_step_keeps_what_is_there_and_takes_what_the_code_before_it_writes(empty: Database) -> None:
    scripts = ScriptDirectory.from_config(_alembic())
    steps = [script.revision for script in reversed(list(scripts.walk_revisions()))]
    assert len(steps) == len(migrations())
    kept: Rows = {}
    before: sa.MetaData | None = None
    for number, step in enumerate(steps, 1):
        with empty.engine.begin() as connection:
            config = _alembic()
            config.attributes["connection"] = connection
            command.upgrade(config, step)
        if before is not None:
            for name, rows in write(empty, before, 1000 + number).items():  # the release before is still at work
                kept[name] += rows
        now = reflected(empty)
        for table in [] if before is None else before.sorted_tables:
            for column in table.columns:
                after = now.tables[table.name].columns[column.name]
                assert repr(after.type) == repr(column.type), (step, after)
                assert after.nullable or not column.nullable, f"{step} makes {after} NOT NULL"
        with empty.engine.connect() as connection:
            for name, rows in kept.items():
                found = connection.execute(sa.select(now.tables[name])).mappings().all()
                assert len(found) == len(rows), (step, name)
                for row in rows:
                    assert any(row.items() <= dict(one).items() for one in found), (step, name, row)
        for name, rows in write(empty, now, number).items():
            kept.setdefault(name, []).extend(rows)
        before = now
    empty.require_schema()
