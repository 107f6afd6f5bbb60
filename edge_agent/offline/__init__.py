"""Commands that run a line in this process, without supervisor or broker.

`run` sorts; `collect` takes labelled views; `contact_sheet` draws what the model sees; `capacity` measures how many
items a second this machine can judge.
"""
