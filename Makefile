.PHONY: install check test bench demo

install:
	pip install -e ".[test]"

# Seconds: what to run before every commit.
check:
	ruff check .
	ruff format --check .
	mypy
	pytest tests/unit -m "not slow" -q

# Everything, as in README.md. Tests that need a GPU skip with a reason where there is none.
test:
	pytest -n 2

bench:
	python -m benchmarks.encoder_serving

demo:
	fettle demo
