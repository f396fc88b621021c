"""`fettle bench`: load on any server that speaks OpenAI's, TEI's or vLLM's shapes, and what came back, and when.

`load` is one client process, `crew` several of them, `figures` sums up, `show` and `plot` present it. `pool`, `http1`
and `sse` send and receive; `traffic`, `texts` and `arrivals` say what is sent and when; `samples` keeps it. Starts no
server and measures no server's own resources.
"""
