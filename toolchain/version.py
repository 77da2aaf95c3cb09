"""The version of this package; it is part of every bundle."""

from importlib.metadata import PackageNotFoundError, version

try:
    VERSION = version("sora-compile")
except PackageNotFoundError:  # run from a source tree that is not installed
    VERSION = "0+unknown"
