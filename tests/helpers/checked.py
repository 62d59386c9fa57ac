"""What `make shapes` checks signatures with: an int may stand for a float, as in typing."""

from __future__ import annotations

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
