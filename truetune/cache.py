"""Where files are kept between runs."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """$TRUETUNE_CACHE, or truetune in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "truetune"
    return Path(os.environ.get("TRUETUNE_CACHE") or default)
