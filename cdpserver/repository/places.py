"""A repository's location as an operator writes it: a directory, or `s3://BUCKET/PREFIX`."""

from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

from cdpserver.errors import UsageError
from cdpserver.names import show
from cdpserver.repository.place import DirectoryPlace, Place

S3 = "s3://"
FORM = "s3://BUCKET/PREFIX?endpoint=https://HOST&region=REGION&profile=PROFILE, all but the bucket optional"


def open_place(location: str) -> Place:
    """Nothing is read there yet. UsageError; RefusedError for an object store without credentials."""
    if not location.startswith(S3):
        return DirectoryPlace(Path(location))
    try:
        parts = urlsplit(location)
        options = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)))
    except ValueError:
        raise UsageError(f"not a location: {show(location)}", hint=FORM) from None
    if "@" in parts.netloc:
        raise UsageError(
            "credentials are not part of a location",
            hint="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or name a profile of ~/.aws/credentials",
        )
    if options.keys() - {"endpoint", "region", "profile"} or not parts.netloc or parts.fragment:
        raise UsageError(f"not a location: {show(location)}", hint=FORM)
    endpoint = options.get("endpoint")
    if endpoint is not None and not endpoint.startswith(("http://", "https://")):
        raise UsageError(f"not an endpoint: {show(endpoint)}", hint=FORM)
    from cdpserver.repository.s3 import S3Place, Store

    store = Store(
        parts.netloc, parts.path.strip("/"), endpoint, options.get("region"), options.get("profile")
    )
    return S3Place(location, store)
