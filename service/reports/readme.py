"""The evidence bundle's README: what lies in it, how to check it, and what that does not show."""

from datetime import datetime
from pathlib import Path
from uuid import UUID

from service.evidence.leaves import moment

TEXT = (Path(__file__).parent / "readme.md").read_text()
ONE = {
    "verify": (
        "    expunge verify certificates/MODEL.json --key {key}    # for each model; where there is one, with\n"
        "        --supplements certificates/MODEL.supplements.json\n"
        "    expunge ledger proof inclusion-proof.json --key {key}"
    ),
    "between": "the second that the request's events are in the ledger; ",
    "certificates": (
        "| `certificates/` | the signed deletion certificates (DSSE around in-toto statements), one a model, and their"
        " supplements; none before the request has completed |\n"
        "| `inclusion-proof.json` | the request's events, each with its proof under the tree head |"
    ),
    "scope": "All of it but the log is about this request.",
}
MANY = {
    "verify": "    expunge verify certificates.jsonl --key {key}",
    "between": "",
    "certificates": (
        "| `certificates.jsonl` | a signed deletion certificate (DSSE around an in-toto statement) a line, with its"
        " supplements |"
    ),
    "scope": (
        "`requests.jsonl`, `targets.jsonl` and `certificates.jsonl` are about requests received in the range,"
        "\n`events.jsonl` about what happened in it."
    ),
}
KEY_SET = "| `keys.json` | the key was changed: every key that was ever used, each signed by the one before |\n"
EMPTY = "\n\n**No request was received in this range**: the files about requests are empty."


def readme(
    since: datetime | None, until: datetime | None, request_id: UUID | None, *, empty: bool, rotated: bool
) -> str:
    """The text for a range or a request; `rotated`: the key was changed, so that keys.json is what to check with."""
    begin = f"from {moment(since)}" if since else "from the beginning"
    end = f"to before {moment(until)}" if until else "until this was made"
    about = f"the deletion request `{request_id}`" if request_id else f"deletion requests received {begin} {end}"
    key, texts = "keys.json" if rotated else "signing.pub", ONE if request_id else MANY
    return TEXT.format(
        about=f"About {about}.{EMPTY if empty else ''}",
        key=key,
        key_set=KEY_SET if rotated else "",
        **texts | {"verify": texts["verify"].format(key=key)},
    )
