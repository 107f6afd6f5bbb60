"""The control plane's side of MQTT.

`connection` speaks to the broker, stores what agents send and acknowledges it after the commit; `reports` reads what an
agent reported last as one type; `desired_state` is the one door through which an agent's desired state changes; `blobs`
publishes bundle chunks as retained messages; `lot_commands` issues a change of lot and records the response.
"""
