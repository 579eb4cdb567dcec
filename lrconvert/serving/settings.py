"""The settings of store and cache in a server's environment: LRCONVERT_STORE and so on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lrconvert.api.expanding import ExpandOptions
from lrconvert.core.errors import LrcError, OptionError
from lrconvert.core.options import make

STORE = "LRCONVERT_STORE"
_SIZE = "20GB"
_OPTIONS = {  # of an expansion, and whether their variables hold a whole number
    "cache_size": False,
    "dtype": False,
    "rank": True,
    "max_rank": True,
    "max_error": False,
}


@dataclass(frozen=True)
class Settings:
    """The `store`: a folder, a URL or ``hf://org/name``; how files are expanded; `base_names`, other names of the model
    that is served (``*``: any); `base`, whose config.json decides names where files do not note them. The cache is
    where `expanded` looks for it."""

    store: str
    options: ExpandOptions
    base_names: tuple[str, ...] = ()
    base: str | None = None

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Settings | None:
        """Return the settings of an environment, None where it names no store. Raises E-OPTION for a value that is
        none."""
        store = environment.get(STORE, "").strip()
        if not store:
            return None
        names = environment.get("LRCONVERT_BASE_NAMES", "").split(",")
        return cls(
            store,
            _options(environment),
            tuple(name.strip() for name in names if name.strip()),
            environment.get("LRCONVERT_BASE", "").strip() or None,
        )


def _options(environment: Mapping[str, str]) -> ExpandOptions:
    values: dict[str, object] = {"cache_size": _SIZE}
    for name, is_whole in _OPTIONS.items():
        text = environment.get(variable := f"LRCONVERT_{name.upper()}", "").strip()
        if not text:
            continue
        try:
            values[name] = int(text) if is_whole else text
            make(ExpandOptions, {name: values[name]}, "it")
        except ValueError:
            raise OptionError(f"{variable} is {text!r:.40}; a whole number was expected") from None
        except LrcError as error:
            raise OptionError(f"{variable} is {text!r:.40}: {error.what}", fix=error.fix) from None
    return make(ExpandOptions, values, "expanded")
