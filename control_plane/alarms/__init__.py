"""From findings to alarms that people act on: their life cycle, their delivery, and what a policy lets them start.

`lifecycle` is the table of states. `raising` is what the loop does to alarms (raise, worsen, clear, escalate), `acting`
what people do; `grouping` says which alarms a person meets as one, `costs` what waiting costs, `policies` decides what
an alarm may ask for. `watcher` is the loop over the watches, of which `reported_faults` finds what lines report
themselves and `detectors` connects detection and fidelity. `notify` stores messages and repeats them until they are
delivered, `senders` speaks to their receivers (signed webhooks, e-mail, MQTT); `details` is what API and pages show,
`exhibits` reads evidence, histograms and pictures for them; `service` puts the parts of the room together.
"""
