"""Find the options that a config has or could have, the rule of each, and those that are spelt alike."""

import dataclasses
import difflib
from collections.abc import Sequence

from ml_collections import ConfigDict

from dtm_jax.options.run_options import NORMALIZATION, RUN_OPTIONS
from dtm_jax.options.sections import NOUNS, Section, dotted_keys, section_of, sections
from dtm_jax.options.socket_options import ALWAYS, SOCKET_OPTIONS
from dtm_jax.options.task_options import TASK_OPTIONS
from dtm_jax.options.value_rules import Rule, anything, of_annotation, text
from dtm_jax.renamed import RENAMED
from dtm_jax.signatures import Parameter


def rule_of(config: ConfigDict, key: str) -> Rule | None:
  """Return the rule of an option such as "optim.lr" in this config; None if there is no such option."""
  section = section_of(config, key)
  if section is not None:
    return _rule_in_section(section, key.removeprefix(f"{section.path}."))
  return _rules_beside_sockets(config).get(key)


def rule_of_choice(socket: str, name: str, option: Parameter) -> Rule:
  """Return the rule of an option of a choice, such as "clip" of "teachers".

  What the choice's docstring says about the option comes before the meaning of the rule, because it is about
  this choice.
  """
  rules = SOCKET_OPTIONS[socket]
  rule = rules.get(f"{name}/{option.name}", rules.get(option.name))
  rule = rule or of_annotation(option.annotation, {"Normalization": NORMALIZATION})
  return dataclasses.replace(rule, about=option.meaning or rule.about)


def known_keys(config: ConfigDict) -> list[str]:
  """Return the keys of all options that this config has or could have."""
  keys = dict.fromkeys(dotted_keys(config))
  for section in sections(config):
    always = ALWAYS.get(section.socket, ()) if _at_top(section) else ()
    keys |= dict.fromkeys(f"{section.path}.{option}" for option in (*section.accepted_options(), *always))
  parents = {*dotted_keys(config, sections=True), ""}
  possible = (key for key in _rules_beside_sockets(config) if key.rpartition(".")[0] in parents)
  return list(keys | dict.fromkeys(possible))


def no_such_option(config: ConfigDict, key: str) -> str:
  """Return the message that there is no such option; it names the nearest ones, or the new name."""
  if key in RENAMED:
    return f"this option is now --config.{RENAMED[key]}"
  section = section_of(config, key)
  if section is None or not section.exists:
    own = [known for known in known_keys(config) if rule_of(config, known)]
    return f"there is no such option for the task {config.get('task')!r}. Nearest: {_nearest(key, own)}"
  option = key.removeprefix(f"{section.path}.")
  options = [*section.accepted_options(), *ALWAYS.get(section.socket, ())]
  near = difflib.get_close_matches(option, options, n=1)
  hint = f" Did you mean {near[0]!r}?" if near else ""
  choice = f"{NOUNS[section.socket]} {section.name!r}"
  return f"{choice} has no option {option!r}.{hint} Its options: {', '.join(options)}"


def _rules_beside_sockets(config: ConfigDict) -> dict[str, Rule]:
  """Return the rules of the options that every run and this task have."""
  return RUN_OPTIONS | TASK_OPTIONS.get(config.get("task"), {})


def _rule_in_section(section: Section, option: str) -> Rule | None:
  if option == "name":
    return text(f"Name of the {NOUNS[section.socket]}, a file of dtm_jax/{section.socket}.")
  if option in ALWAYS.get(section.socket, ()) and _at_top(section):
    return SOCKET_OPTIONS[section.socket][option]
  if not section.exists:
    return anything()  # the unknown name is what is reported
  accepted = section.accepted_options()
  return rule_of_choice(section.socket, section.module, accepted[option]) if option in accepted else None


def _at_top(section: Section) -> bool:
  """Return whether the run itself reads the section. An evaluator's morphers have no weight in the loss."""
  return section.socket != "morphers" or section.path.startswith("morphers.")


def _nearest(key: str, known: Sequence[str]) -> str:
  """Return the keys that are spelt most like `key`, as users type them."""
  near = difflib.get_close_matches(key, known, n=3, cutoff=0.4)
  same_option = [each for each in known if each.rpartition(".")[2] == key.rpartition(".")[2]]
  near = list(dict.fromkeys([*near, *same_option[:2]])) or list(known)
  return ", ".join(f"--config.{each}" for each in near)
