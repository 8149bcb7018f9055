"""Which host the ModelScope SDK asks, and whether it answers at all."""

from __future__ import annotations

import os
import socket
import threading
import urllib.request
from urllib.parse import urlparse

from device_runtime.errors import FetchError

ENDPOINT_VARIABLES = ("MODELSCOPE_ENDPOINT", "MODELSCOPE_DOMAIN")
"""What the SDK reads, the first that is set wins."""

DEFAULT_HOST = "modelscope.cn"
INTERNATIONAL_HOST = "www.modelscope.ai"
REACH_TIMEOUT_S = 8.0


def hub_host() -> str:
    """Return the host that the SDK asks first.

    Raises:
        FetchError: the address that was chosen is none.
    """
    address = _chosen_address()
    if address is not None:
        return urlparse(address).hostname or address
    prefers = os.environ.get("MODELSCOPE_PREFER_AI_SITE", "").strip().lower()
    return INTERNATIONAL_HOST if prefers in ("1", "true", "yes", "on") else DEFAULT_HOST


def check_reachable(what: str) -> None:
    """Find out in seconds whether any hub host answers; a proxy is left to the SDK.

    Raises:
        FetchError: none does, or the address that was chosen is none.
    """
    address = _chosen_address()
    places = [address] if address is not None else [DEFAULT_HOST, INTERNATIONAL_HOST]
    if address is None and hub_host() == INTERNATIONAL_HOST:
        places.reverse()
    reasons = [_try_to_connect(place) for place in places]
    if all(reasons):
        raise unreachable(hub_host(), what, str(reasons[0]))


def unreachable(host: str, what: str, reason: str) -> FetchError:
    """Return the one sentence for a machine without this network."""
    return FetchError(
        f"cannot reach {host} to fetch {what} ({reason}); pass the path of a local folder or file "
        "in its place"
    )


def _chosen_address() -> str | None:
    for name in ENDPOINT_VARIABLES:
        value = os.environ.get(name, "").strip()
        if value:
            address = value if "://" in value else f"https://{value}"
            try:
                urlparse(address)
            except ValueError as error:
                raise FetchError(
                    f"{name} is {value[:80]!r}, which is no address ({error}); set it to one such "
                    f"as https://{DEFAULT_HOST}"
                ) from error
            return address
    return None


def _try_to_connect(place: str) -> str | None:
    """Return why a host does not answer, None when it does or when a proxy stands between."""
    url = urlparse(place if "://" in place else f"https://{place}")
    host, scheme = url.hostname or "", url.scheme
    if urllib.request.getproxies().get(scheme) and not urllib.request.proxy_bypass(host):
        return None
    reasons: list[str | None] = ["no answer in time"]

    def connect() -> None:
        try:
            port = url.port or (80 if scheme == "http" else 443)
            with socket.create_connection((host, port), REACH_TIMEOUT_S):
                reasons[0] = None
        except (OSError, ValueError) as error:
            reasons[0] = str(error)

    # A thread, because a broken resolver takes longer than any timeout of a socket.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(REACH_TIMEOUT_S + 1)
    return reasons[0]
