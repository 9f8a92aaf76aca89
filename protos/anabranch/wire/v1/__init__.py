"""Generated code of format version 1; ``python -m anabranch.wire.generate`` makes it."""
