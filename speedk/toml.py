"""TOML: the standard library's reader, or before Python 3.11 the one that it was."""

import sys

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["tomllib"]
