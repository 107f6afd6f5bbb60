"""The control plane's side of MQTT.

`connection` speaks to the broker, stores what agents send and acknowledges it after the commit; `desired_state` decides
what an agent shall run next; `blobs` publishes bundle chunks as retained messages; `lot_commands` issues a change of
lot and records the response.
"""
