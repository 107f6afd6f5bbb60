"""The REST interface: pages and command line do nothing it cannot.

`services` holds what the routes need, `app` makes the application and maps errors to HTTP in one place, `learning`
and `operating` are the routes, `schemas` what goes in.
"""
