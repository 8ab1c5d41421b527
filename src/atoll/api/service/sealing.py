"""Sealing of what must not lie open in the store: AES-256-GCM with the cell's key (NIST SP 800-38D)."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Callable

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from atoll.model.errors import Corrupt

KEY_BYTES = 32
_NONCE_BYTES = 12


class Sealer:
    """Seals and opens with one key; `context` binds a sealed value to its place, so that it cannot be moved elsewhere."""

    def __init__(self, key: bytes, entropy: Callable[[int], bytes] = os.urandom) -> None:
        if len(key) != KEY_BYTES:
            raise Corrupt(f"the cell's key has {len(key)} bytes, not {KEY_BYTES}", mend="restore the file 'key' from a backup")
        self._cipher = AESGCM(key)
        self._key = key
        self._mac_key = hashlib.sha256(b"atoll fingerprint\0" + key).digest()
        self._entropy = entropy

    def seal(self, plain: bytes, context: str) -> bytes:
        nonce = self._entropy(_NONCE_BYTES)
        return nonce + self._cipher.encrypt(nonce, plain, context.encode())

    def open(self, sealed: bytes, context: str) -> bytes:
        """Raises Corrupt: another key sealed it, or it was changed or moved."""
        try:
            return self._cipher.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], context.encode())
        except (InvalidTag, ValueError):
            raise Corrupt(
                f"{context} cannot be opened with this cell's key", mend="restore the file 'key', or set it again"
            ) from None

    def fingerprint(self, *parts: bytes) -> str:
        """Return a keyed digest of `parts`: equal input shows, the input itself (it may hold a secret) does not."""
        mac = hmac.new(self._mac_key, digestmod=hashlib.sha256)
        for part in parts:
            mac.update(len(part).to_bytes(8, "big"))
            mac.update(part)
        return mac.hexdigest()

    def derive(self, purpose: str) -> bytes:
        """Return a key of 32 bytes for one purpose, from which the cell's key cannot be told."""
        return hmac.new(self._key, b"atoll derive\0" + purpose.encode(), hashlib.sha256).digest()
