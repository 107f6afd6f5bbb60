"""Detection: from sums of windows to findings that name a cause. Pure functions over numbers, no database, no HTTP.

`watch` follows a fleet, `line_watch` is what it keeps of one line. Four channels look for what is unusual, each against
what it can be compared with: `camera_channel` the camera against its own level (belt, light, sharpness, dirt),
`contrast` one line or lane against its siblings on the same lot, `lot_channel` the items and their class mix against
the spread between lots, which `reference` learns. `moments` turns counts in bins into numbers, `sequential` follows
them over time. `causes` reads the pattern of the channels by a table of rules, with `class_shares` for what a shift of
the class mix really is. `accuracy` estimates, without labels, how often the line is right. `facts` is what must be
known of a bundle, `finding` the vocabulary: what is present, where, how large, since how many items, and what a person
should do.

Why not a test of each feature with a p-value: two lots of sound apples differ in every feature, so such tests alarm on
nearly every lot (benchmarks/drift.py runs them beside ours). The unit here is the lot, and the question is whether a
change is larger than lots, days and siblings usually show.
"""
