"""How runs were trained, for their report: the method as people write it, and the options."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

from lora_mini_jax.options import Training, defaults, to_json
from lora_mini_jax.runs.folder import ELSEWHERE, Row
from lora_mini_jax.runs.outcome import Outcome, diverged_at, finished
from lora_mini_jax.runs.tables import MEASURES, table_html
from lora_mini_jax.settings.spec import to_spec

ALWAYS = ("data", "valid", "learning_rate", "schedule", "warmup_ratio", "batch_size", "max_length",
          "epochs", "steps", "max_steps", "seed")  # fmt: skip
"""Options that are told of even where they are the defaults."""
ABOVE = ("model", "method", "settings")
"""What stands above the table."""


def settings_html(runs: Mapping[str, Sequence[Outcome]]) -> str:
    """Method, model, notes and options of ``{name: outcomes, one a seed}``: a table of the options
    that all runs share, and one of the others, run by run."""
    options = dict.fromkeys(n for each in runs.values() for n in worth_telling(each[0].options))
    told = {name: {n: value(n, each) for n in options} for name, each in runs.items()}
    first = next(iter(told.values()))
    own = [n for n in options if any(values[n] != first[n] for values in told.values())]
    shared = [{"option": words(n), "value": first[n]} for n in options if n not in own]
    parts = [f"<p>{html.escape(line(name, each))}</p>" for name, each in runs.items()]
    parts.append(table_html(shared, {"option": "option", "value": "value"}))
    if own:
        columns = {"name": "method", **{n: words(n) for n in own}}
        parts.append(table_html([{"name": n, **told[n]} for n in told], columns))
    return f'<h2>Settings</h2><div class="options">{"".join(parts)}</div>'


def worth_telling(options: Training) -> list[str]:
    """The options that a reader wants to know: the chief ones, and those that are no defaults."""
    given, usual = to_json(options), defaults(options)
    given.pop("epochs" if given.get("max_steps") else "max_steps", None)  # which does not count
    changed = [n for n in given if given[n] != usual.get(n) and n not in (*ELSEWHERE, *ABOVE)]
    return list(dict.fromkeys([*(n for n in ALWAYS if n in given), *changed]))


def value(option: str, outcomes: Sequence[Outcome]) -> str:
    """What an option is in one method's runs, which differ by their seeds alone."""
    if option == "seed":
        return ", ".join(str(each.options.seed) for each in outcomes)
    return text(getattr(outcomes[0].options, option))


def line(name: str, outcomes: Sequence[Outcome]) -> str:
    """What one method's runs were, and what is to be noted of them."""
    asked, done = outcomes[0].options.adapter_method().to_dict(), finished(outcomes)
    said = f"{name}: {to_spec(asked)}."
    if done:
        s = done[0].summary
        said = f"{name}: {spec(s['settings'], asked)}, {s['steps']} steps on {s['model']}."
        said += kept_text(s) + "".join(f" {note}." for note in s["notes"])
    lost = {each.options.seed: each.diverged for each in outcomes if each.diverged is not None}
    return said + "".join(f" Seed {seed} {diverged_at(step)}." for seed, step in lost.items())


def spec(settings: Sequence[Mapping[str, Any]], asked: Mapping[str, Any]) -> str:
    """The methods that were trained, and the one asked for where it made others of itself."""
    trained = " and ".join(to_spec(each) for each in settings)
    if any(each["method"] == asked["method"] for each in settings):
        return trained
    return f"{to_spec(asked)}, which chose {trained}"


def kept_text(summary: Row) -> str:
    """Which step's adapter was saved, where that is not simply the last's."""
    if summary.get("kept") != "best":
        return ""
    name = MEASURES.get(summary["metric"], summary["metric"])
    return f" Kept is the adapter of step {summary['kept_step']}, the best by held-out {name}."


def words(option: str) -> str:
    """An option's name as words."""
    return option.replace("_", " ")


def text(value: Any) -> str:
    """An option's value for readers.

    Example:
        >>> [text(value) for value in (0.01, "", True, ("q_proj", "v_proj"), "\\n")]
        ['0.01', 'not given', 'yes', 'q_proj v_proj', "'\\\\n'"]
    """
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or value in ("", ()):
        return "not given"
    if isinstance(value, tuple):
        return " ".join(map(text, value))
    return str(value) if str(value).isprintable() else repr(value)
