"""Fettle on Ray Serve: the HTTP service, the router, and the replicas around the workers."""

import logging

# A logger of our own under Serve's, which is kept at WARNING: at INFO Serve makes a record of each request, shown or
# not, at a thirtieth of the router's time.
logging.getLogger("ray.serve.fettle").setLevel(logging.INFO)
