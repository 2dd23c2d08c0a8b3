"""What conftest.py checks annotations with: beartype, an int being a float."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
