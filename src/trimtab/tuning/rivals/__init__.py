"""The rivals from the literature, each as its source states, selectable as ``--guard NAME``.

Three kinds: rules that act in the optimizer step (``projecting``, ``stepping``, ``asft``), recipes around training
(``recipes``: data, loss, adapter), repairs after training (``posthoc``). What is unclear in a source is said where it
is implemented. No code of another project was copied.
"""
