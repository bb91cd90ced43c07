"""The command line. Each command parses and calls one function; what is heavy is imported where it is needed.

Exit codes: 0 ok, 1 unexpected error, 2 usage, 3 bad configuration, 4 nothing could be served or downloaded,
130 interrupted.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from llamarunner import __version__
from llamarunner.errors import ConfigError, LlamaRunnerError, RequestError

if TYPE_CHECKING:
    from llamarunner.config.load import LoadedConfig

USAGE, BAD_CONFIG, NOTHING_SERVED = 2, 3, 4

_HELP = """Serve local language models to Ollama, LM Studio and OpenAI clients, and watch it live in the terminal.

Without a command: opens the control center and serves Ollama's dialect on 11434 and LM Studio's on 1234.
"""

_EPILOG = """\b
Examples:
  llamarunner                          the control center
  llamarunner --no-tui                 the same service as a daemon
  llamarunner --profile production --no-tui
  llamarunner init                     write a configuration for this machine
  llamarunner check --explain          every value in force and where it came from
  llamarunner ask smollm2 "Why is the sky blue?"
  llamarunner pull llama3.2:1b         download a model; also hf.co/org/repo:Q4_K_M
  git diff | llamarunner ask qwen3-14b --system "Write a commit message"

\b
Exit codes: 0 ok, 1 unexpected error, 2 wrong usage, 3 bad configuration,
4 nothing could be served or downloaded, 130 interrupted.

\b
Environment: LLAMARUNNER_CONFIG, LLAMARUNNER_PROFILE, LLAMARUNNER_HOME (all files
below one folder), and LLAMARUNNER__SECTION__KEY=value for any key.
"""


class LogLevel(StrEnum):
    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


@dataclass(slots=True)
class Options:
    """What stands before the command; a command's own --config and --profile win."""

    config: Path | None = None
    profile: str | None = None
    log_level: LogLevel | None = None
    skip_validation: bool = False

    def load(self, config: Path | None = None, profile: str | None = None) -> LoadedConfig:
        from llamarunner.config.load import load_config

        self.profile = self.profile if profile is None else profile
        overrides = {"logging.level": self.log_level.value} if self.log_level else {}
        return load_config(
            config or self.config,
            profile=self.profile,
            overrides=overrides,
            validate_files=not self.skip_validation,
        )

    @property
    def wants_traceback(self) -> bool:
        profile = os.environ.get("LLAMARUNNER_PROFILE") if self.profile is None else self.profile
        return self.log_level is LogLevel.DEBUG or profile == "development"


class _Commands(TyperGroup):
    """Turns what a command raises into a message and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except LlamaRunnerError as error:
            _print_error(error)
            raise typer.Exit(_exit_code(error)) from None
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except Exception as error:
            # the last boundary: a person reads one line, not a traceback
            if hasattr(error, "format_message"):
                raise  # a usage error: Typer shows it
            options = ctx.obj if isinstance(ctx.obj, Options) else Options()
            if options.wants_traceback:
                traceback.print_exception(error)
            else:
                _complain(f"{type(error).__name__}: {error}", "this should not happen; --log-level debug shows where")
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=_Commands,
    help=_HELP,
    epilog=_EPILOG,
    rich_markup_mode=None,  # plain help: it is quick, and the daemon never loads rich
    pretty_exceptions_enable=False,  # its tracebacks print local variables, API keys among them
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

ConfigOption = Annotated[
    Path | None, typer.Option("--config", "-c", metavar="FILE", help="Configuration file to use.", show_default=False)
]
ProfileOption = Annotated[
    str | None,
    typer.Option("--profile", "-p", metavar="NAME", help="development, production, testing or one of the file's own."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def main() -> NoReturn:
    app(prog_name="llamarunner")
    sys.exit(0)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"llamarunner {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def serve(
    ctx: typer.Context,
    config: ConfigOption = None,
    profile: ProfileOption = None,
    headless: Annotated[
        bool, typer.Option("--no-tui", "--headless", help="Serve without the control center, as a daemon.")
    ] = False,
    log_level: Annotated[
        LogLevel | None, typer.Option("--log-level", help="In place of logging.level.", case_sensitive=False)
    ] = None,
    skip_validation: Annotated[
        bool,
        typer.Option(
            "--skip-validation",
            help="Do not look whether the models' files exist. Everything else is still checked: wrong keys, types, "
            "names and addresses are always refused.",
        ),
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    ctx.obj = Options(config, profile, log_level, skip_validation)
    if ctx.invoked_subcommand is not None:
        if headless:
            raise typer.BadParameter(f"--no-tui says nothing to `{ctx.invoked_subcommand}`; leave one of them out")
        return
    if not headless and (reason := _no_terminal()):
        _complain(reason, "`llamarunner --no-tui` serves without the control center")
        raise typer.Exit(USAGE)
    loaded = ctx.obj.load()
    from llamarunner.run import run

    raise typer.Exit(run(loaded, tui=not headless))


@app.command(short_help="Validate the configuration.")
def check(
    ctx: typer.Context,
    config: ConfigOption = None,
    profile: ProfileOption = None,
    explain: Annotated[bool, typer.Option("--explain", help="Show every value and where it came from.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Validate the configuration: every problem with its place, and what would be right.

    Exits with 3 where there is any; a model file that is missing counts, though LlamaRunner would start.
    """
    try:
        loaded = ctx.obj.load(config, profile)
    except ConfigError as error:
        if not as_json:
            raise
        _print_json({"ok": False, "error": error.message, "problems": list(error.problems), "warnings": []})
        raise typer.Exit(BAD_CONFIG) from None
    warnings = [str(problem) for problem in loaded.warnings]
    if as_json:
        _print_json(_checked(loaded, warnings, explain=explain))
    else:
        _print_checked(loaded, warnings, explain=explain)
    if warnings:
        raise typer.Exit(BAD_CONFIG)


@app.command(short_help="Write a configuration for this machine.")
def init(
    path: Annotated[
        Path | None, typer.Argument(metavar="[PATH]", help="Where to write it; the usual place if not said.")
    ] = None,
) -> None:
    """Write a commented configuration for this machine. Never overwrites anything."""
    from llamarunner import doctor, paths
    from llamarunner.config.init import write_initial_config

    path = path or paths.config_file()
    gpus, _ = doctor.look_for_gpus()
    machine = write_initial_config(path, gpus=[doctor.gpu_line(gpu) for gpu in gpus])
    typer.echo(f"wrote {path}")
    for port in machine.ports:
        if port.port != port.usual:
            typer.echo(
                f"{port.usual} is held by {port.holder or 'another program'}: {port.proxy} is set to {port.port}"
            )
    typer.echo(f"models found: {len(machine.models)}")


@app.command()
def models(
    ctx: typer.Context, config: ConfigOption = None, profile: ProfileOption = None, as_json: JsonOption = False
) -> None:
    """List the models there are."""
    from llamarunner.catalog.stores import discover, kept_headers, places
    from llamarunner.listing import as_records, as_table

    loaded = ctx.obj.load(config, profile)
    catalog = discover(loaded.config, headers=kept_headers())
    if as_json:
        _print_json(as_records(catalog))
    elif len(catalog):
        typer.echo(as_table(catalog))
    else:
        typer.echo("there are no models; put .gguf files into a folder of discovery.folders,", err=True)
        typer.echo("or download one: llamarunner pull llama3.2:1b", err=True)
        typer.echo(f"searched: {', '.join(places(loaded.config)) or 'nothing at all'}", err=True)


@app.command(short_help="Ask a model once, on the command line.")
def ask(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(help="Name or alias of a model; `llamarunner models` lists them.")],
    prompt: Annotated[
        str | None, typer.Argument(help="The question; - or none at all reads it from standard input.")
    ] = None,
    system: Annotated[str, typer.Option("--system", "-s", metavar="TEXT", help="Instructions put before it.")] = "",
    config: ConfigOption = None,
    profile: ProfileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Ask a model once and stream its answer, through the running instance or by starting what it takes."""
    text = _prompt(prompt)
    loaded = ctx.obj.load(config, profile)
    from llamarunner.ask import ask as ask_model

    raise typer.Exit(ask_model(loaded, model, text, system=system, as_json=as_json))


@app.command(short_help="Download a model.")
def pull(
    ctx: typer.Context,
    model: Annotated[
        str,
        typer.Argument(help="As `ollama pull` knows it (llama3.2:1b), or on Hugging Face (hf.co/org/repo:Q4_K_M)."),
    ],
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Ask a registry of your own by http in place of https.")
    ] = False,
    config: ConfigOption = None,
    profile: ProfileOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print each step as a line of JSON.")] = False,
) -> None:
    """Download a model from Ollama's registry, Hugging Face or another; one broken off goes on where it was."""
    loaded = ctx.obj.load(config, profile)
    from llamarunner.pull import pull as pull_model

    pull_model(loaded, model, insecure=insecure, as_json=as_json)


@app.command(short_help="Remove a model that was downloaded or created.")
def rm(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(help="Its name; `llamarunner models` lists them.")],
    config: ConfigOption = None,
    profile: ProfileOption = None,
) -> None:
    """Remove a model that was downloaded or created, and the files that no other model needs. Nothing of Ollama's, LM
    Studio's or your own folders is ever removed."""
    loaded = ctx.obj.load(config, profile)
    from llamarunner.pull import remove

    remove(loaded, model)
    typer.echo(f"removed {model}")


@app.command(short_help="Report what was found, what is missing, what would help.")
def doctor(
    ctx: typer.Context, config: ConfigOption = None, profile: ProfileOption = None, as_json: JsonOption = False
) -> None:
    """Report what was found: engines, GPUs, memory, ports and who holds them, models; and what would mend what is not.

    Exits with 4 where something keeps LlamaRunner from serving anything.
    """
    from llamarunner.doctor import examine, render, to_json

    report = examine(ctx.obj.load(config, profile))
    if as_json:
        _print_json(to_json(report))
    else:
        typer.echo(render(report))
    if not report.can_serve:
        raise typer.Exit(NOTHING_SERVED)


def _no_terminal() -> str:
    """Why the control center cannot be shown ("" if it can)."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return "the control center needs a terminal on standard input and output"
    return "this terminal (TERM=dumb) cannot show the control center" if os.environ.get("TERM") == "dumb" else ""


def _prompt(prompt: str | None) -> str:
    if prompt is None and sys.stdin.isatty():
        raise typer.BadParameter("a prompt is wanted: as an argument, or on standard input")
    text = sys.stdin.buffer.read().decode("utf-8", "replace") if prompt in (None, "-") else str(prompt)
    if not text.strip():
        raise typer.BadParameter("the prompt is empty")
    return text


def _checked(loaded: LoadedConfig, warnings: Sequence[str], *, explain: bool) -> dict[str, Any]:
    from llamarunner.config.explain import explain as explain_values

    result: dict[str, Any] = {
        "ok": not warnings,
        "path": str(loaded.path) if loaded.path else None,
        "profile": loaded.profile,
        "problems": [],
        "warnings": list(warnings),
    }
    if explain:
        values = explain_values(loaded)
        result["values"] = [{"key": each.key, "value": each.value, "origin": str(each.origin)} for each in values]
    return result


def _print_checked(loaded: LoadedConfig, warnings: Sequence[str], *, explain: bool) -> None:
    from llamarunner.config.explain import explain as explain_values

    if explain:
        values = [(f"{each.key} = {each.value or '(not set)'}", str(each.origin)) for each in explain_values(loaded)]
        width = min(max(len(text) for text, _ in values), 60)
        for text, origin in values:
            typer.echo(f"{text:<{width}}  # {origin}")
    for warning in warnings:
        typer.echo(f"warning: {warning}", err=True)
    where = str(loaded.path) if loaded.path else "no file, the defaults"
    if not warnings and not explain:
        typer.echo(f"the configuration is good ({where}{f', profile {loaded.profile}' if loaded.profile else ''})")


def _exit_code(error: LlamaRunnerError) -> int:
    match error:
        case ConfigError():
            return BAD_CONFIG
        case RequestError():
            return USAGE
        case _:
            return NOTHING_SERVED


def _print_error(error: LlamaRunnerError) -> None:
    """Problems come first, one to a line and with nothing before the file's name: editors jump to such lines."""
    for problem in error.problems if isinstance(error, ConfigError) else ():
        typer.echo(problem, err=True)
    _complain(error.message, error.hint)


def _complain(message: str, hint: str = "") -> None:
    typer.echo(f"error: {message}", err=True)
    if hint:
        typer.echo(f"hint: {hint}", err=True)


def _print_json(value: object) -> None:
    typer.echo(json.dumps(value, ensure_ascii=False, indent=2))
