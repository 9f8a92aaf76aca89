"""How Alembic runs a migration: on the connection it is given, in its transaction."""

from alembic import context

from anabranch.coordinator.store.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    transactional_ddl=True,
    render_as_batch=True,
)
context.run_migrations()
