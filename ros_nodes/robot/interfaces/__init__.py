"""Action interfaces, one file each; `base` has the registry.

Importing this package registers the interfaces that it contains.
"""

import importlib
import pkgutil

for _found in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_found.name}")
