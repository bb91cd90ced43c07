"""nginx before the same engine, as the measure of what proxying costs."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from bench.program import PATIENCE_S, answers, free_port, until

CONFIG = """\
daemon off; worker_processes 1; pid {home}/nginx.pid; error_log {home}/nginx.log;
events {{ worker_connections 1024; }}
http {{
  access_log off;
  client_body_temp_path {home}; proxy_temp_path {home}; fastcgi_temp_path {home}; uwsgi_temp_path {home};
  scgi_temp_path {home};
  upstream engine {{ server 127.0.0.1:{upstream}; keepalive 64; }}
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_pass http://engine; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off;
    }}
  }}
}}
"""


@contextmanager
def nginx(home: Path, upstream: int, cores: set[int] | None = None) -> Iterator[tuple[int, psutil.Process] | None]:
    """Its port and its one worker; None where nginx is not installed."""
    program = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")
    if program is None:
        yield None
        return
    port, config = free_port(), home / "nginx.conf"
    config.write_text(CONFIG.format(home=home, upstream=upstream, port=port), encoding="utf-8")
    process = subprocess.Popen([program, "-c", str(config), "-p", str(home), "-e", str(home / "nginx.log")])
    try:
        until(lambda: answers(port), "answer from nginx")
        [worker] = psutil.Process(process.pid).children()
        if cores:
            worker.cpu_affinity(sorted(cores))
        yield port, worker
    finally:
        process.terminate()
        process.wait(PATIENCE_S)
