"""Writes the pages of docs/reference that say what the code says.

    python docs/generate.py            write them
    python docs/generate.py --check    write nothing; exit with 1 if a page is not what it would be

The command line comes from the Typer app, errors from errors.py, environment variables from
VARIABLES, and the API pages list what each package exports; mkdocstrings reads the docstrings when
the site is built.
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from typer.main import get_command

from engraphy.cli import app
from engraphy.system.environment import VARIABLES, Variable

DOCS = Path(__file__).parent
PACKAGE = DOCS.parent / "src" / "engraphy"
NOTICE = "<!-- Written by docs/generate.py: change the code, then run it again. -->\n"

# Public packages, and the modules in them that are public beside what the package exports.
PACKAGES = {
    "engraphy": ("errors",),
    "engraphy.spec": ("dialects",),
    "engraphy.addresses": ("counts", "counting"),
    "engraphy.rows": ("init",),
    "engraphy.table": ("quantize", "inspection", "usage"),
    "engraphy.released": ("convert", "check", "sample"),
    "engraphy.store": ("testing",),
    "engraphy.fusion": ("presets",),
    "engraphy.memory": ("metrics",),
    "engraphy.train": ("dtype",),
    "engraphy.hf": ("qwen4", "tracing"),
    "engraphy.data": (
        "books",
        "corpus",
        "encoded",
        "ngrams",
        "mix",
        "sources",
        "stdlib",
        "tokens",
        "wiki",
        "domains",
        "smollm2",
    ),
    "engraphy.lm": (
        "loop",
        "optimizers",
        "muon",
        "moe",
        "mla",
        "yarn",
        "hyper",
        "cache",
        "configs",
        "sizes",
        "tables",
    ),
    "engraphy.eval": (
        "losses",
        "bands",
        "kinds",
        "likelihood",
        "choices",
        "harness",
        "humaneval",
        "sandbox",
        "needle_cases",
        "needle_rows",
        "needles",
    ),
    "engraphy.analysis": (
        "gates",
        "inspection",
        "logitlens",
        "cka",
        "collisions",
        "subject",
        "fits",
        "reuse",
    ),
    "engraphy.report": ("page", "inspection", "charts"),
    "engraphy.plan": (),
}
SHORT = "Short for "  # how the help of another spelling begins
CPUS = "the number of CPUs"


def pages() -> dict[str, str]:
    """The text of each generated page, by its path under docs."""
    made = {"reference/index.md": index_page()}
    made["reference/cli.md"] = cli_page()
    made["reference/errors.md"] = errors_page()
    made["reference/environment.md"] = environment_page()
    for package in PACKAGES:
        made[f"reference/{page_name(package)}.md"] = api_page(package)
    return {path: text.replace("\n", "\n" + NOTICE, 1) for path, text in made.items()}


def page_name(package: str) -> str:
    """The name of a package's page: its own last name, in a folder of its own."""
    return f"api/{package.rpartition('.')[2]}"


# --- API ------------------------------------------------------------------------------------------


def index_page() -> str:
    lines = [
        "# Reference",
        "",
        "After this page you know where each public name is described. What is not listed here is",
        "private: it may change without notice.",
        "",
        "| page | what is there |",
        "|---|---|",
        "| [Commands](cli.md) | every verb and option of `engraphy` |",
        "| [Environment variables](environment.md) | what can be set outside of the program |",
        "| [Errors](errors.md) | the one family of errors, and what each one means |",
    ]
    for package in PACKAGES:
        purpose = first_sentence(module_docstring(package))
        lines.append(f"| [`{package}`]({page_name(package)}.md) | {purpose} |")
    return "\n".join(lines) + "\n"


def api_page(package: str) -> str:
    lines = [f"# {package}", "", module_docstring(package), ""]
    if package == "engraphy":
        lines += face()
    else:
        for name in exported(package):
            lines += [f"::: {described(package, name)}", ""]
    for module in public_modules(package):
        lines += [f"## {package}.{module}", "", *module_lines(f"{package}.{module}"), ""]
    return "\n".join(lines).rstrip("\n") + "\n"


def face() -> list[str]:
    """The names of the package itself: each links to the page of the package that it comes from."""
    lines = ["| name | what it is |", "|---|---|"]
    here = []
    for name in exported("engraphy"):
        module = origin(name)
        purpose = plain(first_sentence(docstring_of(module, name)))
        if module.startswith("_"):
            here += ["", f"::: engraphy.{name}"]
            lines.append(f"| [`{name}`](#engraphy.{name}) | {purpose} |")
        else:
            page = "../errors.md" if module == "errors" else f"{module.partition('.')[0]}.md"
            lines.append(f"| [`{name}`]({page}) | {purpose} |")
    return [*lines, *here, ""]


def origin(name: str) -> str:
    """The module, below engraphy, from which the package takes a name."""
    for node in ast.walk(syntax("engraphy")):
        if isinstance(node, ast.ImportFrom) and name in [alias.name for alias in node.names]:
            return node.module or ""
    raise LookupError(f"engraphy/__init__.py: expected an import of {name}, found none")


def docstring_of(module: str, name: str) -> str:
    """The docstring of a class or function. A package names the module that it imports it from."""
    file = PACKAGE.joinpath(*module.split(".")).with_suffix(".py")
    if not file.exists():
        file = PACKAGE.joinpath(*module.split("."), "__init__.py")
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return ast.get_docstring(node) or ""
        if isinstance(node, ast.ImportFrom) and name in [alias.name for alias in node.names]:
            return docstring_of(f"{module}.{node.module}", name)
    raise LookupError(f"{file}: expected a definition of {name}, found none")


def module_lines(module: str) -> list[str]:
    """A module as a whole; of a folder, its docstring and what it exports."""
    if not package_folder(module).is_dir():
        options = ["show_root_heading: false", "show_root_toc_entry: false", "heading_level: 2"]
        return [f"::: {module}", "    options:", *(f"      {option}" for option in options)]
    lines = [module_docstring(module).partition("\n\n")[0]]
    for name in exported(module):
        lines += ["", f"::: {described(module, name)}", "    options:", "      heading_level: 3"]
    return lines


def described(package: str, name: str) -> str:
    """The path of an exported name; within its module if a module of the package has that name."""
    if (package_folder(package) / f"{name}.py").exists():
        return f"{package}.{name}.{name}"
    return f"{package}.{name}"


def public_modules(package: str) -> list[str]:
    """The public modules of a package. errors.py has a page of its own."""
    folder = package_folder(package)
    names = [name for name in PACKAGES[package] if name != "errors"]
    return [name for name in names if (folder / name).is_dir() or (folder / f"{name}.py").exists()]


def exported(package: str) -> list[str]:
    """What a package's __init__ lists in __all__; nothing is imported for it."""
    for node in syntax(package).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return ast.literal_eval(node.value)
    return []


def package_folder(package: str) -> Path:
    return PACKAGE.joinpath(*package.split(".")[1:])


def syntax(package: str) -> ast.Module:
    return ast.parse((package_folder(package) / "__init__.py").read_text())


def module_docstring(package: str) -> str:
    return ast.get_docstring(syntax(package)) or ""


def first_sentence(text: str) -> str:
    line = " ".join(text.split("\n\n")[0].split())
    return line.split(". ")[0].rstrip(".")


# --- errors ---------------------------------------------------------------------------------------


def errors_page() -> str:
    tree = ast.parse((PACKAGE / "errors.py").read_text())
    lines = [
        "# Errors",
        "",
        "After this page you can tell from the name of an error what is wrong. Everything that",
        "Engraphy raises on purpose is an `EngraphyError`. A message names the file or the layer,",
        "what was expected, and what was found.",
        "",
        "```python",
        "from engraphy import HashSpec",
        "from engraphy.errors import ConfigError, EngraphyError",
        "",
        "try:",
        "    HashSpec.demo((1,), (3, 2), heads=2, rows_per_head=100, vocab_size=50, pad_id=0)",
        "except ConfigError as error:",
        "    print(error)",
        "assert issubclass(ConfigError, (EngraphyError, ValueError))",
        "```",
        "",
        '```text title="Output"',
        "orders: expected ascending n-gram orders from 1 to 32, found [3, 2]",
        "```",
        "",
        "At the command line an error is one line, and the exit status is 1.",
        "",
        "| error | is a | when |",
        "|---|---|---|",
    ]
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            bases = ", ".join(f"`{ast.unparse(base)}`" for base in node.bases)
            when = " ".join((ast.get_docstring(node) or "").split())
            lines.append(f"| `{node.name}` | {bases} | {when} |")
    return "\n".join(lines) + "\n"


# --- environment variables ------------------------------------------------------------------------


def environment_page() -> str:
    lines = [
        "# Environment variables",
        "",
        "After this page you can set what Engraphy otherwise chooses from the machine.",
        "A variable that is empty counts as not set. Any other value than those listed is a",
        "`ConfigError` that names the variable.",
        "",
        "```console",
        '$ ENGRAPHY_NATIVE=off engraphy doctor | grep "instruction set"',
        "instruction set  off",
        "```",
        "",
        *variable_table(variable for variable in VARIABLES if not variable.build_time),
        "",
        "`ENGRAPHY_NATIVE` and `ENGRAPHY_THREADS` are read when the native core is loaded, others",
        "at each use.",
        "",
        "## While Engraphy is installed",
        "",
        *variable_table(variable for variable in VARIABLES if variable.build_time),
    ]
    return "\n".join(lines) + "\n"


def variable_table(variables: Iterable[Variable]) -> list[str]:
    lines = ["| variable | values | default | what it does |", "|---|---|---|---|"]
    for variable in variables:
        listed = not isinstance(variable.values, str)
        values = ", ".join(f"`{value}`" for value in variable.values) if listed else variable.values
        default = f"`{variable.default}`" if listed else variable.default
        lines.append(f"| `{variable.name}` | {values} | {default} | {plain(variable.meaning)} |")
    return lines


# --- the command line -----------------------------------------------------------------------------


def cli_page() -> str:
    commands = list(walk(get_command(app), ("engraphy",)))
    short = [(words, command) for words, command in commands if is_short(command)]
    lines = [
        "# Commands",
        "",
        "After this page you can name every verb and option. `engraphy VERB --help` prints the",
        "same. Every command exits with 0 if all is done, sound or equal, and with 1 otherwise; an",
        "error is one line. A command that is called wrongly exits with 2, and one that is stopped",
        "with 130 or 143.",
        "",
        "```console",
        "$ engraphy --version",
        "engraphy ...",
        "```",
        "",
    ]
    for words, command in commands:
        if not is_short(command):
            lines += describe(words, command)
    if short:
        lines += ["## Short spellings", "", "| short | is |", "|---|---|"]
        for words, command in short:
            lines.append(
                f"| `{' '.join(words)}` | {command.help.removeprefix(SHORT).rstrip('.')} |"
            )
    return "\n".join(lines).rstrip("\n") + "\n"


def walk(command: Any, words: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """A command and what is under it, hidden ones left out, with the words that call each."""
    yield words, command
    for name, inner in sorted(getattr(command, "commands", {}).items()):
        if not inner.hidden:
            yield from walk(inner, (*words, name))


def is_short(command: Any) -> bool:
    """Whether a command is only another spelling of one."""
    return (command.help or "").startswith(SHORT)


def describe(words: tuple[str, ...], command: Any) -> list[str]:
    arguments = [part for part in command.params if not is_option(part)]
    options = [part for part in command.params if is_option(part) and not part.hidden]
    spelled = [*words, *(argument_name(part) for part in arguments)]
    if hasattr(command, "commands"):
        spelled.append("VERB")
    if options:
        spelled.append("[OPTIONS]")
    depth = "#" * min(4, len(words) + 1)
    lines = [f"{depth} {' '.join(words)}", "", "```text", " ".join(spelled), "```", ""]
    lines += [plain(inspect.cleandoc(command.help or "")), ""]
    rows = [(f"`{argument_name(part)}`", part.help or "", "") for part in arguments]
    rows += [(spelling(part), part.help or "", default(part)) for part in options]
    if rows:
        lines += ["| | | default |", "|---|---|---|"]
        lines += [f"| {name} | {plain(text)} | {value} |" for name, text, value in rows]
        lines.append("")
    return lines


def is_option(parameter: Any) -> bool:
    return parameter.opts[0].startswith("-")


def argument_name(parameter: Any) -> str:
    return parameter.metavar or parameter.name.upper()


def spelling(option: Any) -> str:
    names = [*option.opts, *option.secondary_opts]
    return ", ".join(f"`{name}`" for name in names)


def default(option: Any) -> str:
    """What an option is if it is not given; "required" if it has to be."""
    if option.required:
        return "required"
    if option.name == "workers":
        return CPUS
    if option.is_flag or option.default in (None, [], ()):
        return ""
    return f"`{option.default}`"


def plain(text: str) -> str:
    """Text in one line, safe in a table."""
    return " ".join(text.split()).replace("|", "\\|")


def main() -> int:
    """Returns the exit status."""
    stale = []
    for path, text in pages().items():
        file = DOCS / path
        if file.exists() and file.read_text() == text:
            continue
        stale.append(path)
        if "--check" not in sys.argv:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
    for path in stale:
        print(path, "is not what the code says" if "--check" in sys.argv else "written")
    return int("--check" in sys.argv and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
