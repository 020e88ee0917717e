"""Content ↔ what the database holds of it: a token, where the store has keys.

The only file that talks to `cryptography`. What is stored begins with a mark, so that a token is told from clear text:

    enc:v1:gAAAA…    a Fernet token
    enc:v0:enc:v…    clear text that begins as a mark does, without keys; whoever reads it gets what is behind the mark
    anything else    clear text
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from .errors import InvalidValue, WrongKey, WrongSetup

MARKED = "enc:v"
TOKEN = "enc:v1:"
CLEAR = "enc:v0:"

_TOKEN_BEGINS = "enc:v1:gAAAA"
"""Until the year 2106: a version and a time, in base64."""

Keys = str | bytes | Sequence[str | bytes]


class Cipher:
    """Seals and opens text and bytes. Without keys it lets them through, and knows a token when it sees one."""

    def __init__(self, keys: Keys | None = None):
        """keys    of Fernet, as of `cryptography.fernet.Fernet.generate_key()`: the first seals, each may open"""
        self._fernets = [] if keys is None else _fernets(keys)

    def __repr__(self) -> str:
        return f"<Cipher of {len(self._fernets)} keys>"

    def __deepcopy__(self, memo: Any) -> "Cipher":
        return self

    @property
    def is_on(self) -> bool:
        return bool(self._fernets)

    def seal(self, text: str) -> str:
        """The text as the database is to hold it."""
        if self._fernets:
            return TOKEN + self._fernets[0].encrypt(text.encode()).decode()
        return CLEAR + text if text.startswith(MARKED) else text

    def open(self, stored: str) -> str:
        """The text of what the database holds; raises `WrongKey`."""
        if not stored.startswith(MARKED):
            return stored
        if stored.startswith(CLEAR + MARKED):
            return stored[len(CLEAR) :]
        return self._decrypted(stored[len(TOKEN) :].encode()).decode() if is_token(stored) else stored

    def seal_bytes(self, content: bytes) -> bytes:
        """`seal`, of bytes."""
        if self._fernets:
            return TOKEN.encode() + self._fernets[0].encrypt(content)
        return CLEAR.encode() + content if content.startswith(MARKED.encode()) else content

    def open_bytes(self, stored: bytes) -> bytes:
        """`open`, of bytes."""
        if not stored.startswith(MARKED.encode()):
            return stored
        if stored.startswith((CLEAR + MARKED).encode()):
            return stored[len(CLEAR) :]
        return self._decrypted(stored[len(TOKEN) :]) if is_token(stored) else stored

    def is_current(self, stored: str | bytes) -> bool:
        """Whether it is a token of the first key."""
        if not self._fernets or not is_token(stored):
            return False
        token = stored[len(TOKEN) :]
        return _opened(self._fernets[0], token if isinstance(token, bytes) else token.encode()) is not None

    def _decrypted(self, token: bytes) -> bytes:
        for fernet in self._fernets:
            content = _opened(fernet, token)
            if content is not None:
                return content
        if not self._fernets:
            raise WrongKey("is encrypted, and this store has no key: connect(…, encrypt=KEY)")
        given = "the key" if len(self._fernets) == 1 else f"any of the {len(self._fernets)} keys"
        raise WrongKey(
            f"cannot be opened with {given} of this store: it was encrypted {_time_of(token)} with another, or changed "
            'since; connect(…, encrypt=[KEY, OLDER]) takes older keys; "llm-orm rotate --check" lists such rows'
        )


def is_token(stored: str | bytes) -> bool:
    begin = stored[: len(_TOKEN_BEGINS)]
    return (begin if isinstance(begin, str) else begin.decode(errors="replace")) == _TOKEN_BEGINS


def _fernets(keys: Keys) -> list[Any]:
    given = [keys] if isinstance(keys, str | bytes) else keys
    if not isinstance(given, Sequence) or not given:
        raise InvalidValue("encrypt= takes a key, or a list of keys, of which the first encrypts; None: no encryption")
    try:
        from cryptography.fernet import Fernet
    except ImportError as error:
        raise WrongSetup('encrypt= needs the package cryptography: pip install "llm-orm[encrypt]"') from error
    fernets = []
    for number, key in enumerate(given, start=1):
        try:
            fernets.append(Fernet(key))
        except (ValueError, TypeError, AttributeError):
            # Whatever was given may be a secret: it is not shown, and neither is what Python says of it.
            raise InvalidValue(
                f"encrypt=: key {number} of {len(given)} is no key of Fernet; make one with "
                "cryptography.fernet.Fernet.generate_key()"
            ) from None
    return fernets


def _opened(fernet: Any, token: bytes) -> bytes | None:
    from cryptography.fernet import InvalidToken

    try:
        return fernet.decrypt(token)
    except InvalidToken:
        return None


def _time_of(token: bytes) -> str:
    """When a token says it was made, which it says in clear."""
    import base64

    try:
        made = int.from_bytes(base64.urlsafe_b64decode(token[:12])[1:9])
        return f"at {datetime.fromtimestamp(made, UTC):%Y-%m-%d %H:%M} UTC"
    except (ValueError, OverflowError, OSError):
        return "at an unknown time"
