"""What a part of the package needs that its base installation has not: named before it is imported.

pyproject.toml says what each extra installs.
"""

from __future__ import annotations

import importlib.util

from serve_app.errors import ConfigError


def require_module(module: str, who: str, *extras: str) -> None:
    """Looks for `module`, does not import it.

    Args:
        module: top-level name, as it is imported.
        who: what needs it, for people.
        extras: those that install it; any of them will do.

    Raises:
        ConfigError: it is not installed; says what to run.
    """
    if importlib.util.find_spec(module) is None:
        commands = " or ".join(f'pip install "kvcache-manager[{extra}]"' for extra in extras)
        raise ConfigError(f"{who} needs `{module}`, which is not installed: {commands}")
