"""A candidate as data, and what is done with one: train it, keep it, restore it, export it."""

from pomona.recipe.execute import Restored, restore, train_recipe
from pomona.recipe.recipe import Recipe

__all__ = ["Recipe", "Restored", "restore", "train_recipe"]
