"""What the wire raises."""

from __future__ import annotations


def one_line(text: str, limit: int = 300) -> str:
    """Untrusted text, fit for a log and a record: one bounded line of printable characters."""
    line = " ".join(text[: 4 * limit].split())[:limit]
    return "".join(letter if letter.isprintable() else "?" for letter in line)


class WireError(ValueError):
    """A message is refused: it is damaged, hostile, or not what the receiver expects.

    Everything a received byte can cause is a WireError, whose text is one line fit for a log and
    for the record of a refused update. Mistakes of the local caller are plain ValueErrors.

    Attributes:
        code: Short name of the reason, stable for machines:

            ============= =================================================================
            truncated     the message ends before what it announces
            trailing      bytes are left over at the end
            too-large     a length is beyond what the receiver expects
            magic         not an Anabranch message
            manifest      the manifest cannot be read, or contradicts itself
            version       a format version this release does not know
            meta          a field that says whose update this is has an impossible value
            codec         a codec this release does not know, or not the announced one
            layout        names, shapes or frames are not those of the local configuration
            counts        entry or non-zero counts do not fit the shapes or the payload
            digest        a payload is not the one its manifest names
            payload       a payload cannot be decoded
            values        a scale or a value is NaN, infinite or otherwise impossible
            importance    the importance is missing, unasked for, or has impossible values
            unsigned      a signature is asked for, and there is none
            unknown-key   the key that signed is not enrolled
            revoked-key   it was, and was revoked
            wrong-key     it is enrolled as somebody else's
            bad-signature it did not sign this
            seal          a sealed update is asked for, and this is none that can be opened
            nonce         a signed update needs 16 bytes of it
            replay        an update with this nonce was admitted before
            expired       it was made before its round was planned
            future        it was made at a time that is yet to come
            unsecured     a node that sends nothing without masks was asked to
            phase         secure aggregation: a message out of turn, or of another session
            threshold     secure aggregation: fewer take part than hide a vector
            equivocation  secure aggregation: two lists of survivors, or of members, are about
            share         secure aggregation: a share is not the one that was dealt
            json          it cannot be read as JSON
            canonical     it is JSON, spelled otherwise than RFC 8785 does
            receipt       a field of a receipt is missing, unknown or impossible
            chain         a receipt does not follow the one before it
            ============= =================================================================
    """

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(one_line(reason))
        self.code = code
