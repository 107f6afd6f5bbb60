"""The data that training and evaluation learn from.

`photo_folder` is the one door for labelled photographs. It reads a `labels.csv` (`labels_csv`) or folders by class
(`layouts`), normalises text (`cells`), refuses contradictions (`checks`; each reader refuses what it cannot read) and
returns a `dataset` with a report of what was left out. `class_order` puts the good class first; `splits` keeps all
views of an item on one side of every split; `surroundings` measures what is not the item, for the search of
shortcuts; `catalog` keeps data sets and their versions under names.
"""
