"""Who withstands what: merge rules against attackers, in three blocks (see ``__main__.py``)."""
