"""What of the hub is known without its client, which takes a second to load and, where there is no network, tries for
half a minute a file: whether it can be reached, and what its cache on this machine holds."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from slimtune.base.embedded import is_embedded
from slimtune.base.named import check_name
from slimtune.cli.formatting import say
from slimtune.errors import UserError

__all__ = ["cached_models", "check_model", "look_for_hub"]

_PATIENCE = 5.0
"""Seconds within which a connection must stand: a packet that is lost is sent again after one and after three."""
_ASKED_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
_TRUE = ("1", "ON", "YES", "TRUE")
"""As the hub's client reads them."""
_PORTS = {"http": 80, "https": 443, "socks4": 1080, "socks5": 1080, "socks5h": 1080}


def look_for_hub(*names: str) -> bool:
    """Where one of the names can only be a hub id, and no connection to the hub can be made: say so, return False, and
    let the hub's client read its cache alone, in this process and those that it starts. A slow one is waited for.

    Called before that client is imported, which reads its setting then; a person's own setting is left alone, and
    nothing is said of one that has it read its cache alone already.
    """
    if not any(map(_is_remote, names)):
        return True
    if asked := [os.environ[name] for name in _ASKED_OFFLINE if name in os.environ]:
        return not any(value.upper() in _TRUE for value in asked)
    url = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    reason = _unreachable(url)
    if reason is None:
        return True
    os.environ["HF_HUB_OFFLINE"] = "1"
    host = urlsplit(url).hostname
    say(f"{host} can't be reached: {reason}. What its cache holds is read, nothing is downloaded.", err=True)
    return False


def check_model(name: str) -> None:
    """See that ``name`` can stand for a model, and that one of the hub can be had: from there, or from its cache.

    Raises:
        UserError: It can't.
    """
    check_name(name)
    if not look_for_hub(name) and not any(path.name == _folder(name) for path in _cached("config.json")):
        raise UserError(
            f"model {name} isn't in the hub's cache on this machine",
            rule="A hub id needs the network once, or the hub's cache from an earlier download.",
            way_out="Check the name and the network, or give a local folder.",
        )


def cached_models() -> list[str]:
    """Hub ids of the models whose config and weights lie in the hub's cache on this machine, the newest first."""
    whole = sorted(_cached("config.json", "*.safetensors"), key=lambda path: -path.stat().st_mtime)
    return ["/".join(path.name.split("--")[1:]) for path in whole]


def _cached(*files: str) -> Iterator[Path]:
    """The folders of the models that the cache holds such files of."""
    value = os.environ.get
    home = value("HF_HOME") or f"{value('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
    root = value("HF_HUB_CACHE") or value("HUGGINGFACE_HUB_CACHE") or f"{home}/hub"
    for path in Path(os.path.expandvars(root)).expanduser().glob(_folder("*/*")):
        if all(any(path.glob(f"snapshots/*/{file}")) for file in files):
            yield path


def _folder(name: str) -> str:
    return f"models--{name.replace('/', '--')}"


def _is_remote(name: str) -> bool:
    return not is_embedded(name) and not Path(name).expanduser().exists()


def _unreachable(url: str) -> str | None:
    """Why no connection can be made to where ``url`` leads, which is the proxy's where there is one; None if one can,
    or if that can't be known."""
    where = urlsplit(url)
    proxies = getproxies()
    proxy = proxies.get(where.scheme) or proxies.get("all")
    if proxy and not proxy_bypass(where.hostname or ""):
        where = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    try:
        host, port = where.hostname, where.port or _PORTS[where.scheme]
    except (ValueError, KeyError):
        return None
    found = [f"no connection within {_PATIENCE:.0f} s"]

    def connect() -> None:
        try:
            socket.create_connection((host, port), timeout=_PATIENCE).close()
            found.clear()
        except TimeoutError:
            pass
        except OSError as error:
            found[:] = [error.strerror or str(error)]

    # Beside this thread, as nothing else bounds how long a name is looked up.
    trying = Thread(target=connect, daemon=True)
    trying.start()
    trying.join(_PATIENCE)
    return found[0] if found else None
