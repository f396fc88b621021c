.PHONY: install check audit test long bench demo

install:
	pip install -e ".[test]"

# Seconds: what to run before every commit.
check:
	ruff check .
	ruff format --check .
	mypy
	python .ci/audit.py
	pytest tests/unit -m "not slow and not long" -q

# The same audit, which fails where something could not be looked up: for a machine with a network.
audit:
	pip install --quiet ".[audit]"
	python .ci/audit.py --strict

# Everything, as in README.md. Tests that need a GPU skip with a reason where there is none.
test:
	pytest -n 2

# Minutes each: clusters of hosts, rollouts, autoscaling.
long:
	pytest -m long

# What needs nothing but this checkout, about 40 minutes; the rest, with the models it takes, is in benchmarks/README.md.
bench:
	python -m benchmarks.serving_path
	python -m benchmarks.encoder_serving
	python -m benchmarks.generation_engine
	python -m benchmarks.generation_serving
	python -m benchmarks.autoscaling
	python -m benchmarks.many_replicas
	python -m benchmarks.bench_agrees

demo:
	fettle demo
