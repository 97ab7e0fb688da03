"""``ctrace metrics``: an OpenMetrics endpoint for Prometheus."""

from __future__ import annotations

import contextlib
import signal
import socket
import sys
from typing import TYPE_CHECKING, Final

import click

from ctrace.cli.kinds import Time, Whole
from ctrace.cli.options import hooks_option
from ctrace.errors import CtraceError

if TYPE_CHECKING:
    from ctrace.view.export.scrape import Scrapes
    from ctrace.view.export.web_config import WebConfig

LISTEN = "127.0.0.1:9632"
MEMORY = 12 << 20
"""Bytes for data that grows with traffic: a few dozen names are served, and the unit has 256
MiB."""


RULES: Final = 15.0
"""Seconds between two readings of the rules: Prometheus scrapes no more often by default."""


@click.command()
@click.option(
    "--listen", default=LISTEN, show_default=True, metavar="HOST:PORT", help="Where to serve."
)
@click.option(
    "--interval",
    default="1s",
    show_default=True,
    type=Time(0.1, 60),
    help="Time between two answers.",
)
@click.option(
    "--limit",
    default=50,
    show_default=True,
    type=Whole(1, 1000),
    metavar="N",
    help="Distinct culprits and victims ever named; later ones share the label 'other'.",
)
@click.option(
    "--addresses",
    is_flag=True,
    help="Add source addresses as labels (without it, none leave this host).",
)
@click.option(
    "--web.config.file",
    "web_config",
    metavar="FILE",
    help="TLS and basic authentication, as Prometheus' exporters take them.",
)
@hooks_option
@click.option("--once", is_flag=True, help="Print one answer after one interval and exit.")
def command(
    listen: str,
    interval: float,
    limit: int,
    addresses: bool,
    web_config: str | None,
    hooks: str | None,
    once: bool,
) -> None:
    """Serve fill, rates, culprits and victims to Prometheus.

    It listens on loopback unless --listen says otherwise. The answer is made once an
    interval, so scraping costs nothing and cannot delay capture.
    """
    try:
        from ctrace.view.export.openmetrics import CONTENT_TYPE_LATEST, Exposition
    except ImportError:
        raise CtraceError(
            "prometheus_client is missing: install it with pip install prometheus-client"
        ) from None
    from ctrace.advice.beside import Reader
    from ctrace.capture import open_live
    from ctrace.change.condition import conditions
    from ctrace.model import Model
    from ctrace.view.export.scrape import Scrapes, parse_listen
    from ctrace.view.export.web_config import WebConfig, read_web_config

    address = parse_listen(listen)
    config = read_web_config(web_config) if web_config else WebConfig()
    exposition = Exposition(limit=limit, addresses=addresses)
    group = "pair" if addresses else "service"
    signal.signal(signal.SIGTERM, _stop)
    server = None if once else Scrapes(address, CONTENT_TYPE_LATEST, config)
    with contextlib.ExitStack() as opened:
        if server is not None:
            opened.callback(server.close)
        source = open_live(hooks=hooks, sample=True)
        opened.callback(source.close)
        model = Model(
            source.hooks,
            source.clock,
            source.started,
            host=socket.gethostname(),
            memory=MEMORY,
            interval=interval,
        )
        if server is not None:
            url = _url(server, config)
            click.echo(f"ctrace: serving {url} ({source.hooks.family} hooks)", err=True)
        reader = Reader(every=RULES, pings=False)  # whose answer is for help alone
        for batch in reader.along(source.batches(interval)):
            model.update(batch)
            if batch.more:
                continue
            moment = model.snapshot(group=group, sort="held", limit=limit)
            text = exposition.text(moment, conditions())
            if server is None:
                click.echo(text.decode(), nl=False)
                return
            server.text = text


def _url(server: Scrapes, config: WebConfig) -> str:
    host, port = str(server.server_address[0]), server.server_address[1]
    name = f"[{host}]" if ":" in host else host
    return f"{'https' if config.tls else 'http'}://{name}:{port}/metrics"


def _stop(*_: object) -> None:
    sys.exit(0)
