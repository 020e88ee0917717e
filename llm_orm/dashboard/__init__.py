"""The page in the browser: what was spent, on whom, for what, and whether it is getting worse.

The only part that needs Starlette and Jinja2, which the extra `dashboard` brings along.
"""

from ..errors import WrongSetup

try:
    import jinja2 as _jinja2  # noqa: F401
    import starlette as _starlette  # noqa: F401
except ImportError as error:
    raise WrongSetup('the dashboard needs starlette and jinja2: pip install "llm-orm[dashboard]"') from error

from .app import create_app

__all__ = ["create_app"]
