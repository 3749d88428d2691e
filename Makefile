# Every task of the kit; `make` alone lists them.
#
# Nothing is installed globally except missing programs of the system (nginx,
# Redis; for tests browsers), by its package manager and with a sentence.

# The port of the stack; stacks on different ports live beside each other.
PORT ?= 8080
# Application processes of `make up`.
APPS ?= 2
# Of `make up`: none lets anybody in, jwt asks for tokens, which `make token` makes.
AUTH ?= none
SUB ?=
SUBSCRIBE ?=
PUBLISH ?=
ADMIN ?=
TTL ?= 3600
# What `make test` runs, and on how many processes: tests wait more than they
# compute, so one more than two cores.
TESTS ?= tests
WORKERS ?= 3
# It counts what its own process holds, so no other test may have been there.
ALONE := tests/test_handoff.py
# What failed beside others is tried once more with the machine for itself, and
# said: a broken promise fails again, a test that was only crowded out does not.
AGAIN = { [ $$? -eq 1 ] && echo "What failed is run once more, alone." && $(PYTHON) -m pytest --last-failed --last-failed-no-failures none; }
# `make loadtest`: see loadtest/README.md; empty ones are the scenario's own.
# SECONDS of `make fuzz`, too: 600 where it is empty.
HOST ?=
SCENARIO ?= smoke
STREAMS ?=
SECONDS ?=
RATE ?=
PROCESSES ?= 1
THRESHOLDS ?=
# More options, as `python -m loadtest --help` lists them.
OPTIONS ?=
# `make loadtest-compare`: two results, or their folders.
A ?=
B ?=
# `make bench`: 1 for a fifth of the streams, in under 5 minutes.
# `make test-faults`: 1 for each fault once, in under 3 minutes.
QUICK ?=
# `make test-faults`: names with commas (`make test-faults ONLY=help` lists them),
# the seed of the faults at random, and how many seeds after it.
ONLY ?=
SEED ?=
SEEDS ?=
FAULTS = $(if $(QUICK),--quick) $(if $(ONLY),--only $(ONLY)) $(if $(SEED),--seed $(SEED)) $(if $(SEEDS),--seeds $(SEEDS))

PYTHON := .venv/bin/python
STACK := $(PYTHON) -m app.stack

.DEFAULT_GOAL := help

##@ Start

.PHONY: help
help: ## Show this list.
	@awk 'BEGIN { FS = ":.*## " } \
	  /^##@ / { printf "\n%s\n", substr($$0, 5) } \
	  /^[a-z0-9-]+:.*## / { printf "  %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: up
up: stack-packages venv ## Start Redis, APPS=2 processes and nginx on PORT=8080 (AUTH=jwt: with tokens).
	@$(STACK) up --port="$(PORT)" --apps="$(APPS)" --auth="$(AUTH)"

.PHONY: down
down: ## End what `make up` started on PORT, and only that.
	@if [ -x $(PYTHON) ]; then $(STACK) down --port="$(PORT)"; else echo "Nothing was ever started here."; fi

.PHONY: token
token: venv ## Make a token for AUTH=jwt (SUB=alice SUBSCRIBE='a b/*' PUBLISH= ADMIN=1 TTL=).
	@$(PYTHON) -m app token --secret-file=".run/$(PORT)/jwt-secret" --sub="$(SUB)" --subscribe="$(SUBSCRIBE)" \
	  --publish="$(PUBLISH)" --ttl="$(TTL)" $(if $(ADMIN),--admin)

.PHONY: run
run: venv ## One process on PORT, log in memory; no Redis, no nginx.
	@SSE_PORT="$(PORT)" SSE_DRAIN_SECONDS=$${SSE_DRAIN_SECONDS:-2} SSE_TASK_ROOT="$${SSE_TASK_ROOT-app}" exec $(PYTHON) -m app

##@ Look

.PHONY: status
status: venv ## Show the parts of the stack on PORT.
	@$(STACK) status --port="$(PORT)"

.PHONY: logs
logs: venv ## Follow all logs of the stack on PORT.
	@$(STACK) logs --port="$(PORT)"

.PHONY: feed
feed: venv ## Publish the stack's own access log, live, into the topic `logs`.
	@$(STACK) feed --port="$(PORT)"

##@ Deploy

# OVERLAY: a folder of k8s/overlays. CONTEXT: kubectl's, else the current one.
# IMAGE: the application's, NAME:TAG or NAME@sha256:… YES=1: do not ask.
OVERLAY ?= local
DEPLOY = @python3 k8s/deploy.py $@ --overlay "$(OVERLAY)" --context "$(CONTEXT)" --image "$(IMAGE)" $(if $(YES),--yes)
IMAGES = --registry "$(REGISTRY)" --tag "$(or $(TAG),0.1.0)"

.PHONY: image push render diff secrets deploy smoke rollback undeploy
image: ## Build the images, with docker, podman or buildah (TAG=, REGISTRY=, PLATFORM=).
	@python3 k8s/images.py build $(IMAGES)
push: ## Push them to REGISTRY.
	@python3 k8s/images.py push $(IMAGES)
render: ## Print what OVERLAY=local would apply.
	$(DEPLOY)
diff: ## Show what `make deploy` would change.
	$(DEPLOY)
secrets: ## Make the Secrets that the overlay needs (REPLACE=sse-tls: that one anew).
	$(DEPLOY) $(if $(REPLACE),--replace "$(REPLACE)")
deploy: ## Check, show, apply, wait, test (OVERLAY=, IMAGE=, CONTEXT=, YES=1, SMOKE=0).
	$(DEPLOY) $(if $(filter 0,$(SMOKE)),--no-smoke)
smoke: ## Test streams inside of the cluster, with a rolling restart under them.
	$(DEPLOY)
rollback: ## Bring the version of before back.
	$(DEPLOY)
undeploy: ## Delete all but the namespace, Secrets and volumes.
	$(DEPLOY)

##@ Check

.PHONY: test
test: test-packages test-venv ## Run all tests (TESTS=tests/test_stack.py: one file).
	@$(if $(filter tests,$(TESTS)),$(PYTHON) -m pytest -n $(WORKERS) --dist worksteal $(ALONE) || $(AGAIN))
	@$(PYTHON) -m pytest -n $(WORKERS) --dist worksteal $(TESTS) $(if $(filter tests,$(TESTS)),--ignore=$(ALONE)) || $(AGAIN)

.PHONY: test-limits
test-limits: test-packages test-venv ## Run what guards the limits alone: the race, killed and frozen processes, tabs.
	@$(PYTHON) -m pytest tests/test_limits.py tests/test_leases.py tests/test_buckets.py tests/browser/test_limited_tabs.py

.PHONY: lint
lint: test-venv ## Check style, types and who may import what.
	@$(PYTHON) -m ruff check
	@$(PYTHON) -m mypy
	@.venv/bin/lint-imports

.PHONY: fuzz
fuzz: test-venv ## Feed the parsers with nonsense for SECONDS=600.
	@FUZZ_SECONDS=$(or $(SECONDS),600) $(PYTHON) -m pytest -q tests/test_fuzz.py

.PHONY: nginx-check
nginx-check: test-packages test-venv ## Test nginx's files: syntax in every form, gixy, behaviour on 1.30.
	@echo "System: $$(PATH=$$PATH:/usr/sbin nginx -v 2>&1). Beside it: nginx $$(.make/nginx.sh version)."
	@$(PYTHON) -m pytest -n $(WORKERS) --dist worksteal tests/test_nginx.py tests/nginx

.PHONY: nginx-fresh
nginx-fresh: test-venv ## Ask whether nginx's floor and gixy's table are the newest.
	@.make/fresh.sh

.PHONY: nginx-size
nginx-size: venv ## Print nginx's settings for STREAMS=50000 (ARGS=--help: more).
	@$(PYTHON) nginx/size.py $(STREAMS) $(ARGS)

.PHONY: test-mutations
test-mutations: test-packages test-venv ## Break each guarantee, see its test fail (ONLY=, LIST=1, CHECK=1).
	@$(PYTHON) -m tests.mutations --only "$(ONLY)" $(if $(LIST),--list) $(if $(CHECK),--check)

.PHONY: test-faults
test-faults: test-packages test-venv ## Break real parts, audit every stream (QUICK=1, ONLY=, SEED=, SEEDS=).
	@$(PYTHON) -m tests.faults $(FAULTS)

.PHONY: loadtest
loadtest: stack-packages test-venv ## Hold streams: HOST=, SCENARIO=smoke, STREAMS=, PROCESSES=1.
	@$(PYTHON) -m loadtest --host "$(HOST)" --port $(PORT) --apps $(APPS) --processes $(PROCESSES) \
	  --scenario "$(SCENARIO)" $(if $(STREAMS),--streams $(STREAMS)) $(if $(SECONDS),--seconds $(SECONDS)) \
	  $(if $(RATE),--rate $(RATE)) $(if $(THRESHOLDS),--thresholds "$(THRESHOLDS)") $(OPTIONS)

.PHONY: loadtest-cluster
loadtest-cluster: ## The same from inside of the cluster: OVERLAY=, PROCESSES=1, SCENARIO=smoke.
	$(DEPLOY) --workers "$(PROCESSES)" --loadtest-image "$(LOADTEST_IMAGE)" --scenario "$(SCENARIO)" --streams "$(STREAMS)" \
	  --seconds "$(SECONDS)" --rate "$(RATE)" --thresholds "$(THRESHOLDS)" --options='$(OPTIONS)'

.PHONY: loadtest-compare
loadtest-compare: test-venv ## Set two results side by side: A=, B=.
	@$(PYTHON) -m loadtest compare "$(A)" "$(B)"

.PHONY: bench
bench: bench-packages test-venv ## Measure against the peers (QUICK=1: under 5 minutes).
	@QUICK=$(QUICK) $(PYTHON) -m loadtest.bench --install

##@ Maintain

.PHONY: lock
lock: test-venv ## Write both requirements.txt anew, with hashes.
	@.make/lock.sh

.PHONY: clean
clean: ## End every stack of this clone and remove all that make made.
	@if [ -x $(PYTHON) ]; then $(STACK) down --all; fi
	@rm -rf .venv .python .run .cache .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Not for the list: what the targets above need first.
.PHONY: stack-packages test-packages bench-packages venv test-venv
stack-packages:
	@.make/packages.sh stack
test-packages:
	@.make/packages.sh stack test
	@.make/nginx.sh
bench-packages:
	@.make/packages.sh stack bench
venv:
	@.make/python.sh run
test-venv:
	@.make/python.sh test
