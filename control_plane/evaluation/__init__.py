"""Measures how good a model is, by item and with intervals.

`metrics` computes figures with intervals over items; `items` fuses the views of an item as the line does; `evaluate`
judges a labelled folder as an agent would; `operating_point` learns the band in which the line is unsure and reports
what a recipe costs on held-out items (thresholds follow from costs in `models.recipe`); `shortcuts` measures how well
the classes differ in what is not the item.
"""
