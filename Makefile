.PHONY: install check test long bench demo

install:
	pip install -e ".[test]"

# Seconds: what to run before every commit.
check:
	ruff check .
	ruff format --check .
	mypy
	pytest tests/unit -m "not slow and not long" -q

# Everything, as in README.md. Tests that need a GPU skip with a reason where there is none.
test:
	pytest -n 2

# Minutes each: clusters of hosts, rollouts, autoscaling.
long:
	pytest -m long

bench:
	python -m benchmarks.encoder_serving

demo:
	fettle demo
