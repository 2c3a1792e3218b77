"""Run one trial of some parts of the campaign, so that the campaign itself keeps working."""

import pytest

from tests.campaign import __main__ as campaign
from tests.campaign import trial


@pytest.mark.slow
@pytest.mark.long  # test_buckets.py kills a run and resumes it, test_checkpoint_errors.py has damage
@pytest.mark.parametrize("part", ["interruptions", "damage", "bad_inputs"])  # nightly.yml runs all parts
def test_smoke(part, reference, tmp_path):
  outcomes = campaign.run(reference, tmp_path / part, [part], smoke=True)
  everything = [each for found in outcomes.values() for each in found]
  assert everything
  assert not [each for each in everything if each.verdict == "wrong"], everything


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
  return campaign.make_reference(tmp_path_factory.mktemp("campaign"))


def test_an_outcome_says_what_went_wrong(tmp_path):
  def fails(folder):
    assert folder.is_dir(), "unreachable"
    raise AssertionError("the state differs")

  def skips(folder):
    raise trial.Skipped("no disk")

  found = [
    trial.attempt(trial.Trial(name, run), tmp_path / name)
    for name, run in (("good", lambda folder: "fine"), ("bad", fails), ("none", skips))
  ]
  assert [each.verdict for each in found] == ["right", "wrong", "skipped"]
  assert "the state differs (test_campaign.py:" in found[1].remark
  assert trial.summary_row("part", found).startswith("| part | 2 | 1 | 1 | 1 |")
  page = campaign.report({"part": found})
  assert "- bad: AssertionError: the state differs" in page
  assert "- none: no disk" in page
