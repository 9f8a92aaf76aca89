"""Backdoors: suspicion that needs no data, and merges that look for them on unlabelled data.

``config.py`` says what can be asked for, and loads no torch. ``suspicion.py`` judges a cohort from
its factors (``features.py``, ``outliers.py``); ``consequences.py`` says what then happens.
``on_data.py`` merges by what unlabelled inputs say: ``calibration.py`` is what it is given,
``dam.py`` what it learns, ``masking.py`` the masks.
"""
