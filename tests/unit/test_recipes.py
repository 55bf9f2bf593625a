"""Every shipped recipe is a config that composes, and says how it is launched."""

from __future__ import annotations

from pathlib import Path

import pytest

import raytune_ds
from raytune_ds.compose import compose

RECIPES = sorted((Path(raytune_ds.__file__).parent / "recipes").glob("*.yaml"))


def test_there_are_recipes() -> None:
    """An empty folder would pass all tests below."""
    assert {"lora.yaml", "laptop.yaml"} <= {path.name for path in RECIPES}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_composes_and_carries_its_launch_command(recipe: Path) -> None:
    """No unknown key, no value out of bounds; the header launches this very file."""
    config = compose([recipe], [])
    assert config.model.name
    header = [line for line in recipe.read_text().splitlines() if line.startswith("#")]
    verb = "sweep" if config.sweep.space else "train"
    assert any(f"raytune_ds.{verb} --config raytune_ds/recipes/{recipe.name}" in line for line in header)
