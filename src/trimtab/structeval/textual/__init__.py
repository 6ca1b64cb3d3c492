"""The five formats that do not render: JSON, YAML, TOML, XML, CSV.

Covered: ``check`` (strict, safe) for each; ``official.parse`` with the reference's parsers and its idea of success.
Not covered: formats that render (``formats``).
"""

from __future__ import annotations

from trimtab.structeval.textual.strict import CHECKS, Checked, check_csv, check_json, check_toml, check_xml, check_yaml

NAMES = tuple(CHECKS)

__all__ = ["CHECKS", "NAMES", "Checked", "check_csv", "check_json", "check_toml", "check_xml", "check_yaml"]
