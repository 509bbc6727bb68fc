"""How commands reach an arm, one file an interface; `base` has the table. Importing this fills it
with ours.
"""

import importlib
import pkgutil

for _found in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_found.name}")
