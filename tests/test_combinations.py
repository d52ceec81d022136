"""The table of combinations is what building them says."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "docs"))
import combinations

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "combinations.md"


def test_the_page_is_up_to_date():
    """`make docs` writes it."""
    assert PAGE.read_text() == combinations.render()


def test_what_is_refused_is_not_in_the_table():
    found, refused = combinations.attempt(("TiTok", "CNN"))
    assert "latent grid (1, 64)" in refused and set(found.values()) == {refused}
    found, refused = combinations.attempt(("CNN", "CNN"))
    assert refused is None and set(found.values()) == {None}
    assert len(found) == len(combinations.codebooks()) * 3 * 2


def test_a_misfit_that_can_be_built_is_noticed():
    with pytest.raises(AssertionError, match=r"quantizer\.dim=64 can be built now"):
        combinations.refusal(("quantizer.dim=64",))


def test_which_generator_takes_which_tokens():
    assert combinations.fit("var", "multiscale", 2) is None
    assert "single grid" in combinations.fit("var", "single", 1)
    assert set(combinations.generators()) == {"Llama", "MaskGITUViT", "MaskGITViT", "RAR", "VAR"}


def test_every_recipe_of_a_published_model_is_listed():
    folder = ROOT / "conf" / "experiment"
    models = [path for path in folder.rglob("*.yaml") if "Command: python eval.py" not in path.read_text()]
    names = {path.relative_to(folder).with_suffix("").as_posix() for path in models}
    listed = {recipe.name for recipe in combinations.recipes()}
    assert listed <= names and not any(name.startswith(combinations.OWN_DATA) for name in listed)
    published = ("ibq/", "rar/", "robustok/", "titok/", "var/", "xqgan/")
    assert {name for name in names if name.startswith(published)} <= listed
