"""``python -m anabranch.cli``, for torchrun."""

from anabranch.cli.main import main

main()
