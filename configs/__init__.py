"""A file for each run, and what they have in common: durations in any unit, sections that follow another."""

from ml_collections import config_dict

UNITS = {"steps": int, "examples": int, "epochs": float}


def durations(name, **given):
  """The options {name}_steps, {name}_examples and {name}_epochs, of which `given` has a value for one.

  The finest that is given wins: steps, then examples, then epochs. An option keeps its type if it is set to
  None, so that each of them can be typed: `--config.total_epochs=2`.
  """
  return {
    f"{name}_{unit}": config_dict.FieldReference(given.get(unit), field_type=kind)
    for unit, kind in UNITS.items()
  }


def references(section):
  """A section whose values are those of another, changed with them until they are set themselves."""
  return {name: section.get_oneway_ref(name) for name in section}
