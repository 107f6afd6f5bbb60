"""Devices of a real line behind the interfaces: encoders, ejectors, inputs and sensors over Modbus/TCP, MQTT and GPIO.

Each device is named by a URL (`address`) and opened by one function: `encoder.open_encoder`, `ejectors.open_ejector`,
`item_sensors.open_scalar`, `photo_eyes.open_photo_eyes`, `belt.open_belt`, `heartbeat.open_heartbeat`. What decides is
pure and takes time as an argument (`PulseEncoder`, `ShotQueue`, `ValveTimer`, `ScalarJoin`); what talks runs in a
thread of its own, so that the line never waits for a wire. `pulses` turns counts into a position, `shot_queue` hands
shots to a thread that writes, `belt` stops the belt, `heartbeat` shows that the line is alive; `modbus`, `mqtt` and
`gpio` are the wires. Everything that comes from a wire is checked, counted in `counters`, and dropped when it is wrong:
it never ends a thread.

pymodbus and gpiod are optional extras and are loaded only when a URL asks for them.
"""
