"""Which flag and variable is whose when a process serves one or several predictors, and where each value came from.

`--describe.model X` and `DESCRIBE__MODEL=X` are for one predictor. `--port 1` and `PORT=1` are for the process, or for
the only one who has such a setting. `--model X` and `MODEL=X` are refused when several predictors have one each.
"""

import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

from dotenv import dotenv_values
from pydantic import AliasChoices
from pydantic_settings import CliImplicitFlag

from sightline.settings import JobSettings, PipelineSettings, ServerSettings, load, shown

DOTENV = Path(".env")

_PER_PREDICTOR = {"queue_size", "max_parts"}
_LISTENER = set(ServerSettings.__annotations__) - _PER_PREDICTOR
"""What a process has once, however many predictors it serves."""

_SHARED = set(JobSettings.model_fields) | {"cache_dir", "hf_token", "device", "threads", "reasoning_level"}
"""What means the same to all who have it; everything else that several have is each one's own."""

Kinds = Mapping[str, type[ServerSettings]]


@dataclass(frozen=True, slots=True)
class Configured:
    """The settings of one predictor.

    origins   of each field: `flag --port`, `env PORT`, `.env PORT` or `default`
    """

    settings: ServerSettings
    origins: Mapping[str, str]

    def is_default(self, field: str) -> bool:
        return self.origins[field] == "default"


@dataclass(frozen=True, slots=True)
class _Said:
    """One value as somebody gave it. `name` is as it was written."""

    origin: Literal["flag", "env", ".env"]
    name: str
    value: str
    is_own: bool  # given for this predictor by name

    def __str__(self) -> str:
        return f"{self.origin} {self.name}"


class _Fault(Exception):
    """Something that the person who starts the server must mend."""


def configure(kinds: Kinds, argv: Sequence[str], *, prog: str = "sightline") -> dict[str, Configured]:
    """The settings of every predictor of one process, from its flags, its environment and `.env`.

    kinds   settings class by predictor name, in the order in which they were asked for
    Raises SystemExit(2) after one line per fault on stderr, SystemExit(0) after `--help`.
    """
    if {"-h", "--help"} & set(argv):
        _help(kinds, prog)
    try:
        flags = _assigned(kinds, list(_flags(kinds, argv)))
        variables = {kind: _variables(kinds, kind, flags[kind]) for kind in kinds}
    except _Fault as fault:
        sys.stderr.write(f"{prog}: {fault}\n")
        raise SystemExit(2) from fault
    return {kind: _configured(cls, flags[kind], variables[kind], f"{prog} {kind}") for kind, cls in kinds.items()}


def local_steps(configured: Mapping[str, Configured]) -> set[Literal["describe", "enhance"]]:
    """The steps that a gateway takes in its own process: those that are served beside it, unless told an address."""
    gateway = configured.get("pipeline")
    if gateway is None:
        return set()
    steps: tuple[Literal["describe", "enhance"], ...] = ("describe", "enhance")
    return {step for step in steps if step in configured and gateway.is_default(f"{step}_url")}


def told(configured: Mapping[str, Configured]) -> dict[str, dict[str, dict[str, object]]]:
    """All values with their origins, secrets hidden: `{predictor: {field: {"value": …, "from": …}}}`."""
    local = local_steps(configured)
    answer: dict[str, dict[str, dict[str, object]]] = {}
    for kind, item in configured.items():
        rows = {
            name: {"value": value, "from": item.origins[name]} for name, value in sorted(shown(item.settings).items())
        }
        if isinstance(item.settings, PipelineSettings):
            for step in local:
                rows[f"{step}_url"] = {"value": None, "from": "served in this process"}
        answer[kind] = rows
    return answer


def shown_as_table(answer: Mapping[str, Mapping[str, Mapping[str, object]]]) -> str:
    """What `told` says, for people: a line for each value, in columns."""
    lines: list[str] = []
    for kind, rows in answer.items():
        lines += [kind, *(f"  {name:<26} {_text(row['value']):<50} {row['from']}" for name, row in rows.items()), ""]
    return "\n".join(lines)


def _text(value: object) -> str:
    if value is None:
        return "-"
    return ", ".join(map(str, cast("list[object]", value))) or "none" if isinstance(value, list) else str(value)


# --- flags -----------------------------------------------------------------------------------------------------------


def _flags(kinds: Kinds, argv: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(name, value) of `--name value`, `--name=value`, and `--name` or `--no-name` of a switch."""
    tokens = list(argv)
    while tokens:
        token = tokens.pop(0)
        if not token.startswith("--"):
            raise _Fault(f"{token!r} is no flag")
        name, has_value, value = token[2:].partition("=")
        if not has_value:
            if _is_switch(kinds, name):
                value = "true"
            elif _is_switch(kinds, name.replace("no-", "", 1)):
                name, value = name.replace("no-", "", 1), "false"
            elif tokens:
                value = tokens.pop(0)
            else:
                raise _Fault(f"--{name} needs a value")
        yield name, value


def _is_switch(kinds: Kinds, name: str) -> bool:
    """Whether a flag stands alone, as `--reload` does."""
    tail = name.rpartition(".")[2]
    fields = [cls.model_fields[field] for cls in kinds.values() if (field := _field(cls, tail)) is not None]
    return any(get_args(CliImplicitFlag[bool])[1] in field.metadata for field in fields)


def _assigned(kinds: Kinds, flags: Sequence[tuple[str, str]]) -> dict[str, dict[str, list[_Said]]]:
    """Who gets which flag: predictor → field → what was said, in order; the predictor's own flags alone if it has."""
    answer: dict[str, dict[str, list[_Said]]] = {kind: {} for kind in kinds}
    for name, value in flags:
        head, is_own, tail = name.partition(".")
        if is_own:
            takers = {head: _own_field(kinds, head, tail)}
        else:
            takers = _takers(kinds, name)
            if not takers:
                raise _Fault(f"no setting is called --{name}; --help lists them")
            _check_shared(takers, f"--{name}", [f"--{kind}.{_kebab(field)}" for kind, field in takers.items()])
        for kind, field in takers.items():
            answer[kind].setdefault(field, []).append(_Said("flag", f"--{name}", value, bool(is_own)))
    for fields in answer.values():
        for field, said in fields.items():
            fields[field] = [item for item in said if item.is_own] or said
    return answer


def _own_field(kinds: Kinds, kind: str, name: str) -> str:
    if kind not in kinds:
        raise _Fault(f"--{kind}.{name}: {kind} is not served by this process")
    field = _field(kinds[kind], name)
    if field is None:
        raise _Fault(f"--{kind}.{name}: {kind} has no such setting")
    if len(kinds) > 1 and field in _LISTENER:
        raise _Fault(f"--{kind}.{name}: a process has one {field}; say --{_kebab(field)}")
    return field


def _takers(kinds: Kinds, name: str) -> dict[str, str]:
    found = {kind: _field(cls, name) for kind, cls in kinds.items()}
    return {kind: field for kind, field in found.items() if field is not None}


def _check_shared(takers: Mapping[str, str], name: str, instead: Sequence[str]) -> None:
    fields = set(takers.values())
    if len(takers) > 1 and not (len(fields) == 1 and fields <= _SHARED):
        raise _Fault(f"{name}: {' and '.join(takers)} each have their own; say {' or '.join(instead)}")


# --- variables -------------------------------------------------------------------------------------------------------


def _variables(kinds: Kinds, kind: str, flags: Mapping[str, object]) -> dict[str, _Said]:
    """What the environment, then `.env`, says to the fields that no flag decides. Empty values say nothing."""
    places: tuple[tuple[Literal["env", ".env"], Mapping[str, str | None]], ...] = (
        ("env", os.environ),
        (".env", dotenv_values(DOTENV, encoding="utf-8") if DOTENV.is_file() else {}),
    )
    answer: dict[str, _Said] = {}
    for origin, variables in places:
        known = {name.lower(): (name, value) for name, value in variables.items() if value}
        for field in set(kinds[kind].model_fields) - set(flags) - set(answer):
            if (said := _variable(kinds, kind, field, known, origin)) is not None:
                answer[field] = said
    return answer


def _variable(
    kinds: Kinds, kind: str, field: str, known: Mapping[str, tuple[str, str]], origin: Literal["env", ".env"]
) -> _Said | None:
    names = _variables_of(kinds[kind], field)
    for name in names:
        if (found := known.get(f"{kind}__{name}".lower())) is not None:
            if len(kinds) > 1 and field in _LISTENER:
                raise _Fault(f"{found[0]}: a process has one {field}; say {field.upper()}")
            return _Said(origin, *found, is_own=True)
    for name in names:
        if (found := known.get(name.lower())) is not None:
            takers = {
                other: own
                for other, cls in kinds.items()
                for own in cls.model_fields
                if name in _variables_of(cls, own)
            }
            _check_shared(takers, found[0], [f"{taker}__{own}".upper() for taker, own in takers.items()])
            return _Said(origin, *found, is_own=False)
    return None


def _variables_of(cls: type[ServerSettings], field: str) -> list[str]:
    """The variables of a field, nearest first: its own name, unless it is an older service's name for another field."""
    others = {name for other in cls.model_fields if other != field for name in _names(cls, other) if name.isupper()}
    return [name for name in map(str.upper, _names(cls, field)) if name not in others]


# --- both ------------------------------------------------------------------------------------------------------------


def _configured(
    cls: type[ServerSettings], flags: Mapping[str, Sequence[_Said]], variables: Mapping[str, _Said], prog: str
) -> Configured:
    """Everything that was said goes to the settings as flags, so that they have nothing left to decide."""
    every = {field: [said] for field, said in variables.items()} | dict(flags)
    argv = [_as_flag(cls, field, item.value) for field, said in every.items() for item in said]
    # Blip's MODEL_NAME is its model's (contract E9), and must not become its name in the routes as well.
    taken = [name for name in cls.model_fields if name not in every and name.upper() not in _variables_of(cls, name)]
    argv += [_as_flag(cls, field, str(cls.model_fields[field].default)) for field in taken]
    origins = dict.fromkeys(cls.model_fields, "default")
    origins |= {field: str(said) for field, said in variables.items()}
    origins |= {field: str(said[-1]) for field, said in flags.items()}
    return Configured(load(cls, argv, prog=prog), origins)


def _names(cls: type[ServerSettings], field: str) -> list[str]:
    """What the field may be called, its own name first."""
    alias = cls.model_fields[field].validation_alias
    return [str(choice) for choice in alias.choices] if isinstance(alias, AliasChoices) else [field]


def _field(cls: type[ServerSettings], name: str) -> str | None:
    """The field that is called so, in any spelling: `model`, `MODEL`, `load-8bit`, `QWEN_MODEL_NAME`."""
    wanted = name.replace("-", "_").lower()
    if wanted in cls.model_fields:
        return wanted
    for field in cls.model_fields:
        if wanted in {alias.lower() for alias in _names(cls, field)}:
            return field
    return None


def _as_flag(cls: type[ServerSettings], field: str, value: str) -> str:
    if _is_switch({"": cls}, field) and value.lower() in _YES | _NO:
        return f"--{'' if value.lower() in _YES else 'no-'}{_kebab(field)}"
    return f"--{_kebab(field)}={value}"


_YES = {"true", "1", "yes", "on"}
_NO = {"false", "0", "no", "off"}


def _kebab(field: str) -> str:
    return field.replace("_", "-")


def _help(kinds: Kinds, prog: str) -> None:
    """Print the flags and exit. One predictor has argparse's page; several have their own below the common ones."""
    if len(kinds) == 1:
        ((kind, cls),) = kinds.items()
        load(cls, ["--help"], prog=f"{prog} {kind}")
    common = set(ServerSettings.model_fields) - _PER_PREDICTOR
    lines = [
        f"usage: {prog} {' '.join(kinds)} [--flag value …]",
        "",
        "Once for the process (variables: PORT, …):",
        *(_described(ServerSettings, field, "") for field in ServerSettings.model_fields if field in common),
    ]
    for kind, cls in kinds.items():
        lines += ["", f"For {kind} (variables: {kind.upper()}__MODEL_NAME, …):"]
        lines += [_described(cls, field, f"{kind}.") for field in cls.model_fields if field not in common]
    sys.stdout.write("\n".join([*lines, ""]))
    raise SystemExit(0)


def _described(cls: type[ServerSettings], field: str, prefix: str) -> str:
    info = cls.model_fields[field]
    text = re.sub(r"\s+", " ", info.description or "")
    return f"  --{prefix + _kebab(field):<34} {text} (default: {info.get_default()})".replace("  (", " (")
