# The two commands: `make demo` runs a real app on real parts, `make test` runs every test.
.PHONY: setup demo test coverage lint lock bench clean

setup:
	@scripts/setup.sh

demo: setup
	@.venv/bin/python examples/demo.py

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports
	@$(MAKE) --no-print-directory -s -C src/atoll/runtimes/native strict

# Two at a time, a file of tests always whole: most of them wait for real parts rather than compute.
test: lint
	.venv/bin/python -m pytest -m "not soak" -n 2 --dist loadfile

coverage: setup
	.venv/bin/coverage erase
	.venv/bin/coverage run -m pytest -m "not soak"
	.venv/bin/coverage combine -q
	.venv/bin/coverage report --format=total | sed 's/^/coverage: /; s/$$/ %/'

lock:
	.venv/bin/pip-compile -q --generate-hashes --strip-extras --allow-unsafe --extra dev --extra bench --extra plots \
	    --no-emit-index-url --no-emit-find-links --no-emit-trusted-host -o requirements.lock pyproject.toml

bench: setup
	.venv/bin/python -m bench --list

clean:
	rm -rf .venv build .mypy_cache .ruff_cache .pytest_cache .import_linter_cache htmlcov .coverage*
