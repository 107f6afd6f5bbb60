"""The embedded MQTT 3.1.1 broker: for a demo, a test, a packing house of one box.

Its own process, standard library only, secure by construction: identity is decided before any session is touched, a
session's key is (identity, client id), and one function, `authorize(identity, action, topic)`, decides on publish,
will, subscribe, retained and queued delivery. Everything is bounded (`BrokerLimits`), and what a bound drops or refuses
is counted. `packets` is the codec, `topics` the matching, `sessions` the limits, the quarantine and the state that
outlives a connection, `broker` the fan-out, `connection` one client, `acceptor` unauthenticated connections, `server`
the whole; `client_certificates` identifies a client by mutual TLS, `access` by a password (this machine only) and, in
`access.authorize`, decides what an identity may do. A larger fleet runs mosquitto, EMQX or HiveMQ instead; the same
integration tests run on this broker and on mosquitto.

Not kept over a restart: sessions and retained messages. The control plane notices by its sentinel and republishes.
"""
