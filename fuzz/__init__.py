"""Fuzzing: one target, driven by Hypothesis in every test run and by atheris in ``make fuzz``."""
