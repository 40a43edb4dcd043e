"""Whether a server can be reached: a short probe, so that a missing connection costs seconds and not minutes."""

import socket
import threading
import urllib.request
from urllib.parse import urlsplit

PROBE_SECONDS = 10.0
_PORTS = {"http": 80, "https": 443, "socks5": 1080, "socks5h": 1080}


def reachable(url: str, seconds: float | None = None) -> bool:
    """Whether the server of an address takes a connection in time; where the environment sets a proxy, the proxy does.

    Args:
        seconds: how long to wait; None: `PROBE_SECONDS`.
    """
    seconds = PROBE_SECONDS if seconds is None else seconds
    address = urlsplit(url)
    proxies = urllib.request.getproxies()
    proxy = proxies.get(address.scheme) or proxies.get("all")
    if proxy and not urllib.request.proxy_bypass(address.hostname):
        address = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    port = address.port or _PORTS.get(address.scheme, 443)

    reached = threading.Event()

    def connect():  # in a thread: a name look-up has no time limit of its own
        try:
            socket.create_connection((address.hostname, port), timeout=seconds).close()
            reached.set()
        except OSError:
            pass

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(seconds)
    return reached.is_set()
