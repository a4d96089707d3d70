import pytest

from hf_distill.arguments import RecipeArguments
from hf_distill.licenses import caution, require_license, strictest


@pytest.mark.parametrize(
    ("license", "words"),
    [
        (None, "unknown: check it"),
        ("unknown", "unknown: check it"),
        ("cc-by-nc-4.0", "forbids commercial use"),
        ("fair-noncommercial-research-license", "forbids commercial use"),
        ("cc-by-nd-4.0", "forbids adaptations"),
        ("llama3.1", "has terms of its own"),
        ("gemma", "has terms of its own"),
    ],
)
def test_what_a_teachers_licence_asks_for(license, words):
    assert words in caution(license)


@pytest.mark.parametrize("license", ["apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc0-1.0"])
def test_what_asks_for_credit_at_most_is_free(license):
    assert caution(license) is None


def test_of_several_the_one_that_asks_for_something_counts():
    assert strictest(["mit", "cc-by-nc-4.0", None]) == "cc-by-nc-4.0"
    assert strictest([None, "cc-by-nc-4.0"]) == "cc-by-nc-4.0"  # a known ban is not hidden by what is unknown
    assert strictest(["mit", None]) is None
    assert strictest(["apache-2.0", "mit"]) == "apache-2.0"
    assert strictest([]) is None


def test_a_licence_that_the_hub_does_not_know_is_refused_before_the_work():
    require_license(None)
    with pytest.raises(ValueError, match=r"the licence is 'appache-2.0', expected one of the ids"):
        RecipeArguments(license="appache-2.0")
    with pytest.raises(ValueError, match=r"the licence is 'free'"):
        RecipeArguments(teacher_license="free")
