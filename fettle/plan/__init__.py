"""`fettle plan`: what it takes to bear a load within an objective, from a family's measured tables and points.

`workload` says what rows need, `cores` shares processors, `station` is the queue before a variant, `cell` one router
with its replicas in simulated time, `sizing` looks for the fewest replicas, `limits` says where a tier ends, `show`
presents it. The policy is the product's own: `fettle.scheduling`, `fettle.gears`, `fettle.menu`, `fettle.costs`.
"""
