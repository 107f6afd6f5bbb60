"""The control plane's side of MQTT.

`connection` speaks to the broker; `intake` holds what arrived until it is stored; `ingest` stores it and acknowledges
after the commit; `spooled` turns spooled records into rows and keeps the pictures that agents send as evidence,
`window_payload` says how a window lies in the database; `history` keeps how agents were set up, from when to when;
`outbox` gives out what agents shall know: acknowledgements, signed metadata, desired states, commands; `blobs`
publishes bundle chunks as retained messages; `desired_state` is the one door through which an agent's desired state
changes; `reports` reads what an agent reported last as one type; `labels` says which labels hold; `twins` notices two
boxes under one identity; `lot_commands` issues a change of lot and records the response; `forgetting` removes an agent
that is gone for good.
"""
