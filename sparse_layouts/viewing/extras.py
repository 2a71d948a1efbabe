"""Packages that only some of what people look at needs, and the extras that bring them."""

from __future__ import annotations

import importlib
from typing import Any

EXTRAS = {
    "rich": "cli",
    "tqdm": "cli",
    "matplotlib": "viz",
    "ipywidgets": "notebooks",
    "IPython": "notebooks",
    "safetensors": "safetensors",
    "transformers": "hf",
}


def pip_command(package: str) -> str:
    """What installs an optional package: its extra, where it is in one.

    >>> from sparse_layouts.viewing.extras import pip_command
    >>> pip_command("matplotlib")
    "pip install 'sparse_layouts[viz]'"
    """
    extra = EXTRAS.get(package)
    return f"pip install {package}" if extra is None else f"pip install 'sparse_layouts[{extra}]'"


def needed(module: str, what: str) -> Any:
    """The module, imported; raises `ModuleNotFoundError` that names the pip command for what is not
    installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        raise ModuleNotFoundError(
            f"{what} needs the package {package}: {pip_command(package)}", name=package
        ) from None
