"""What differs between model families: rows of data, and code for the three that need it."""

from .table import FAMILIES, REFUSED, Family, reasons_against, supported_families, trained_length

__all__ = ["FAMILIES", "REFUSED", "Family", "reasons_against", "supported_families", "trained_length"]
