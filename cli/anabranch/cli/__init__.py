"""The ``anabranch`` command: the front door, thin, above everything."""
