"""What of the hub is known without its client, which takes a second to load, tries for half a minute a file where there
is no network, and waits for good where nothing is answered: whether the hub can be reached and answers, and what its
cache on this machine holds."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, ProxyHandler, Request, build_opener, getproxies, proxy_bypass

from slimtune.base.embedded import is_embedded
from slimtune.base.named import check_name
from slimtune.cli.formatting import say
from slimtune.errors import UserError

__all__ = ["cached_models", "check_model", "look_for_hub"]

_PATIENCE = 5.0
"""Seconds within which a connection must stand: a packet that is lost is sent again after one and after three."""
_ANSWER = 10.0
"""Seconds within which it must answer: the client gives up a file that it asks for after as many, unless its own
setting of that is larger."""
_ASKED_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
_TRUE = ("1", "ON", "YES", "TRUE")
"""As the hub's client reads them."""
_PORTS = {"http": 80, "https": 443, "socks4": 1080, "socks5": 1080, "socks5h": 1080}


def look_for_hub(*names: str) -> bool:
    """Where one of the names can only be a hub id, and no connection to the hub can be made, or it doesn't answer: say
    so, return False, and let the hub's client read its cache alone, in this process and those that it starts. One that
    is slow, and not too slow for its client, is left to that.

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
    """Why no connection can be made to where ``url`` leads, which is the proxy's where there is one, or what is there
    doesn't answer; None if it does, or if that can't be known."""
    where = urlsplit(url)
    proxies = getproxies()
    proxy = proxies.get(where.scheme) or proxies.get("all") or ""
    if proxy_bypass(where.hostname or ""):
        proxy = ""
    if proxy:
        proxy = proxy if "://" in proxy else f"http://{proxy}"
        where = urlsplit(proxy)
    try:
        host, port = where.hostname, where.port or _PORTS[where.scheme]
    except (ValueError, KeyError):
        return None
    reason = _late(f"no connection within {_PATIENCE:.0f} s", _PATIENCE, lambda: _connect(host, port))
    if reason is not None or where.scheme.startswith("socks"):  # which the standard library doesn't speak
        return reason
    setting = os.environ.get("HF_HUB_ETAG_TIMEOUT", "")
    patience = max(_ANSWER, float(setting) if setting.isdecimal() else 0.0)
    return _late(f"no answer within {patience:.0f} s", patience, lambda: _ask(url, proxy, patience))


def _late(late: str, seconds: float, do: Callable[[], str | None]) -> str | None:
    """What ``do`` gives; ``late`` if it takes longer than that. It runs beside this thread, as nothing else bounds how
    long a name is looked up."""
    found: list[str | None] = [late]

    def run() -> None:
        with suppress(TimeoutError):
            found[0] = do()

    trying = Thread(target=run, daemon=True)
    trying.start()
    trying.join(seconds)
    return found[0]


def _connect(host: str | None, port: int) -> str | None:
    try:
        socket.create_connection((host, port), timeout=_PATIENCE).close()
    except TimeoutError:
        raise
    except OSError as error:
        return error.strerror or str(error)
    return None


class _Stay(HTTPRedirectHandler):
    """An answer that sends elsewhere is one."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _ask(url: str, proxy: str, seconds: float) -> None:
    """Whatever is answered will do: an error's number, or that a certificate isn't trusted, is the client's to say.

    Raises:
        TimeoutError: Nothing is.
    """
    try:
        opener = build_opener(_Stay, ProxyHandler({urlsplit(url).scheme: proxy} if proxy else {}))
        opener.open(Request(url, method="HEAD"), timeout=seconds).close()
    except HTTPError as answer:
        answer.close()
    except (OSError, HTTPException, ValueError) as error:
        if isinstance(getattr(error, "reason", error), TimeoutError):
            raise TimeoutError from None
