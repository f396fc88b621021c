"""The systems that Fettle is compared with, each started the way its own users start it."""
