"""Backdoors: suspicion that needs no data, and merges that look for them on unlabelled data.

``config.py`` says what can be asked for, and loads no torch. ``suspicion.py`` judges a cohort from
its factors (``features.py``, ``outliers.py``); ``consequences.py`` says what then happens.
"""
