"""Models, their numbered versions, their bytes and their recipes.

`versions` registers a bundle as a version and moves it between stages; `store` keeps bundles by digest; `recipes`
changes grades, prices and thresholds of a version, which makes a new bundle.
"""
