"""Refuses a transformers that is too old by its version, before an import fails and says less."""

import re

import transformers

OLDEST_TRANSFORMERS = (5, 17)


def check_transformers(version: str) -> None:
    """Refuses a version of transformers before the oldest one that the package is made for.

    Args:
        version: of transformers; one that does not begin with two numbers is taken as it is.

    Raises:
        ImportError: says which version is there, which one is needed, and how to get it.
    """
    found = re.match(r"(\d+)\.(\d+)", version)
    if found and tuple(map(int, found.groups())) < OLDEST_TRANSFORMERS:
        raise ImportError(
            f"hf_longattn needs transformers 5.17 or later, before 6, got {version}: "
            "`pip install 'transformers>=5.17,<6'`.",
            name="transformers",
        )


check_transformers(transformers.__version__)
