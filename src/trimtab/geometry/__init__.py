"""``trimtab geometry``: what safety and task gradients of a model look like, measured, drawn and put in a table.

A room of its own beside ``tuning``, whose pools and rules it uses. The mathematics is in ``gradients/analysis.py``.
"""
